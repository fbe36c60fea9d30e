"""The engine's answers are the model's, whatever they are batched with."""

from pathlib import Path

import pytest
import torch

from medgpt.config.base import ConfigError
from medgpt.config.evaluation import PoolConfig
from medgpt.data.sources.records import Message
from medgpt.data.tokenized.chat import for_chat
from medgpt.eval.engine import Engine
from medgpt.eval.requests import Choose, Chosen, Prompt, Replied, Reply, Weigh, Weighed
from medgpt.models.generate import reply_all
from medgpt.models.prompts import choice_ids, prompt_ids, text_ids
from tests.models.packing import speaking_model

TEXTS = ["高血压是常见的慢性病。", "什么是高血压?血压持续升高。Answer: A or B."] * 50


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A fresh model with a chat template and 128 positions."""
    model, tokenizer = speaking_model(TEXTS, 800, max_positions=128)
    chat = for_chat(tokenizer)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    chat.save_pretrained(folder)
    return Engine(str(folder), precision="auto", pool=PoolConfig(batch_replies=4))


@torch.inference_mode()
def logprob(engine: Engine, ids: list[int], last: int) -> float:
    """Of the last tokens, from a plain forward."""
    row = torch.tensor([ids])
    logprobs = engine.model(row).logits.log_softmax(-1)[0, :-1]
    return float(logprobs.gather(1, row[0, 1:, None])[-last:].sum())


def one(engine: Engine, request: Choose | Weigh | Reply) -> Chosen | Weighed | Replied:
    (response,) = engine.run([request])
    return response


@pytest.mark.parametrize(
    "prompt", ["什么是高血压?Answer:", (Message("user", "什么是高血压?"),)], ids=["plain", "chat"]
)
def test_options_are_scored_as_the_model_scores_them(engine: Engine, prompt: Prompt):
    options = (" A", "B", "血压持续升高")
    response = one(engine, Choose("x", prompt, options))
    assert isinstance(response, Chosen)
    assert response.characters == [1, 1, 6]
    choice = choice_ids(engine.tokenizer, prompt, options)
    assert list(choice.prompt) == prompt_ids(engine.tokenizer, prompt)
    for ids, found, tokens in zip(choice.options, response.logprobs, response.tokens, strict=True):
        assert found == pytest.approx(logprob(engine, [*choice.prompt, *ids], len(ids)), abs=1e-4)
        assert tokens == len(ids)


def test_a_prompt_and_an_option_that_share_a_token_leave_it_to_the_option(engine: Engine):
    tokenizer = engine.tokenizer
    choice = choice_ids(tokenizer, "Answer: ", ("A", "B"))
    whole = tokenizer("Answer: A", add_special_tokens=False)["input_ids"]
    assert [*choice.prompt, *choice.options[0]] == whole
    assert tokenizer.decode(list(choice.prompt)) == "Answer:"


def test_a_prompt_that_is_too_long_loses_its_beginning_and_says_so(engine: Engine):
    long = "血压持续升高" * 60
    response = one(engine, Choose("x", long + "?", ("A", "B")))
    assert isinstance(response, Chosen)
    assert response.cut
    ids = prompt_ids(engine.tokenizer, long + "?")[-128:]
    (a,) = choice_ids(engine.tokenizer, "?", ("A",)).options
    assert response.logprobs[0] == pytest.approx(logprob(engine, [*ids, *a][-129:], 1), abs=1e-3)
    reply = one(engine, Reply("x", long, 8))
    assert isinstance(reply, Replied)
    assert reply.cut


def test_an_option_that_is_longer_than_the_model_reads_is_told_by_its_question(engine: Engine):
    option = "血压持续升高" * 60
    with pytest.raises(ConfigError, match=r"question q7 has an option of \d+ tokens, .* has 128"):
        engine.run([Choose("q7", "?", ("A", option))])


def test_a_text_is_weighed_by_tokens_and_by_characters(engine: Engine):
    text = "什么是高血压?血压持续升高。"
    response = one(engine, Weigh("x", text))
    assert isinstance(response, Weighed)
    ids, characters = text_ids(engine.tokenizer, text)
    first = engine.tokenizer.decode(ids[:1])
    assert (response.tokens, response.characters) == (len(ids) - 1, len(text) - len(first))
    assert response.characters == characters
    assert response.nll == pytest.approx(-logprob(engine, ids, len(ids) - 1), abs=1e-3)


def test_an_empty_text_weighs_nothing(engine: Engine):
    assert one(engine, Weigh("x", "")) == Weighed("x", 0, 0, 0)


def test_a_sampled_reply_does_not_depend_on_the_others(engine: Engine):
    requests = [
        Reply(f"id{i}", (Message("user", "高血压" * (1 + i % 3)),), 12, 1.0, samples=2, seed=5)
        for i in range(7)
    ]
    together = {response.id: response for response in engine.run(requests)}
    for request in (requests[0], requests[5]):
        alone = one(engine, request)
        assert alone == together[request.id]
        assert isinstance(alone, Replied)
        assert alone.texts[0] != alone.texts[1]
    (other,) = engine.run([Reply("id0", requests[0].prompt, 12, 1.0, samples=2, seed=6)])
    assert other != together["id0"]


def test_a_reply_says_whether_it_came_to_an_end(engine: Engine):
    def reply(ends: list[int]) -> tuple[str, bool]:
        prompts = [prompt_ids(engine.tokenizer, "高血压")]
        options = {"max_new_tokens": 3, "temperature": 0.0, "seeds": [0]}
        return reply_all(engine.model, engine.tokenizer, prompts, ends, **options)[0]

    assert not reply([len(engine.tokenizer) - 1])[1]
    assert reply(list(range(len(engine.tokenizer)))) == ("", True)


def test_a_reply_that_leaves_no_room_for_a_prompt_is_refused(engine: Engine):
    with pytest.raises(ConfigError, match="max_new_tokens=128 leaves no room"):
        engine.run([Reply("x", "高血压", 128)])


def test_an_untrained_model_is_the_same_architecture_with_weights_of_a_seed(tmp_path: Path):
    model, tokenizer = speaking_model(TEXTS, 800, max_positions=128)
    model.save_pretrained(tmp_path)
    for_chat(tokenizer).save_pretrained(tmp_path)
    options = {"precision": "auto", "pool": PoolConfig()}
    trained = Engine(str(tmp_path), **options)
    one, same, other = (Engine(str(tmp_path), **options, fresh_seed=seed) for seed in (1, 1, 2))
    texts = [Weigh("x", "血压持续升高。" * 3)]
    assert one.run(texts) == same.run(texts)
    assert len({engine.run(texts)[0].nll for engine in (trained, one, other)}) == 3
    assert one.model.config.to_dict() == trained.model.config.to_dict()


def test_a_model_without_weights_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no model in"):
        Engine(str(tmp_path), precision="auto", pool=PoolConfig())

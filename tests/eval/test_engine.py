"""The engine scores and generates as the model does, whatever else is in the batch."""

from pathlib import Path

import pytest
import torch

from medgpt.config.base import ConfigError
from medgpt.config.evaluation import EvalPoolConfig
from medgpt.data.sources.records import Message
from medgpt.data.tokenized.chat_template import prepare_chat_tokenizer
from medgpt.eval.engine import EvalEngine
from medgpt.eval.requests import (
    Generate,
    GenerateResponse,
    Loglikelihood,
    LoglikelihoodResponse,
    Prompt,
    RollingLoglikelihood,
    RollingLoglikelihoodResponse,
)
from medgpt.models.generate import generate_responses
from medgpt.models.prompts import encode_prompt, encode_prompt_options, encode_text
from tests.models.tiny_models import model_with_tokenizer

TEXTS = ["高血压是常见的慢性病。", "什么是高血压?血压持续升高。Answer: A or B."] * 50


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> EvalEngine:
    """A new model with a chat template and 128 positions."""
    model, tokenizer = model_with_tokenizer(TEXTS, 800, max_positions=128)
    chat = prepare_chat_tokenizer(tokenizer)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    chat.save_pretrained(folder)
    return EvalEngine(str(folder), precision="auto", pool=EvalPoolConfig(batch_replies=4))


@torch.inference_mode()
def plain_logprob(engine: EvalEngine, ids: list[int], last: int) -> float:
    """Return the log-probability of the last tokens from a plain forward."""
    row = torch.tensor([ids])
    logprobs = engine.model(row).logits.log_softmax(-1)[0, :-1]
    return float(logprobs.gather(1, row[0, 1:, None])[-last:].sum())


def run_one(
    engine: EvalEngine, request: Loglikelihood | RollingLoglikelihood | Generate
) -> LoglikelihoodResponse | RollingLoglikelihoodResponse | GenerateResponse:
    (response,) = engine.run([request])
    return response


@pytest.mark.parametrize(
    "prompt", ["什么是高血压?Answer:", (Message("user", "什么是高血压?"),)], ids=["plain", "chat"]
)
def test_option_logprobs_equal_a_plain_forward(engine: EvalEngine, prompt: Prompt):
    options = (" A", "B", "血压持续升高")
    response = run_one(engine, Loglikelihood("x", prompt, options))
    assert isinstance(response, LoglikelihoodResponse)
    assert response.characters == [1, 1, 6]
    choice = encode_prompt_options(engine.tokenizer, prompt, options)
    assert list(choice.prompt) == encode_prompt(engine.tokenizer, prompt)
    for ids, found, tokens in zip(choice.options, response.logprobs, response.tokens, strict=True):
        assert found == pytest.approx(
            plain_logprob(engine, [*choice.prompt, *ids], len(ids)), abs=1e-4
        )
        assert tokens == len(ids)


def test_a_token_shared_by_prompt_and_option_belongs_to_the_option(engine: EvalEngine):
    tokenizer = engine.tokenizer
    choice = encode_prompt_options(tokenizer, "Answer: ", ("A", "B"))
    whole = tokenizer("Answer: A", add_special_tokens=False)["input_ids"]
    assert [*choice.prompt, *choice.options[0]] == whole
    assert tokenizer.decode(list(choice.prompt)) == "Answer:"


def test_a_prompt_that_is_too_long_loses_its_beginning_and_is_marked_as_cut(engine: EvalEngine):
    long = "血压持续升高" * 60
    response = run_one(engine, Loglikelihood("x", long + "?", ("A", "B")))
    assert isinstance(response, LoglikelihoodResponse)
    assert response.cut
    ids = encode_prompt(engine.tokenizer, long + "?")[-128:]
    (a,) = encode_prompt_options(engine.tokenizer, "?", ("A",)).options
    assert response.logprobs[0] == pytest.approx(
        plain_logprob(engine, [*ids, *a][-129:], 1), abs=1e-3
    )
    reply = run_one(engine, Generate("x", long, 8))
    assert isinstance(reply, GenerateResponse)
    assert reply.cut


def test_an_option_longer_than_the_context_is_an_error_that_names_its_question(engine: EvalEngine):
    option = "血压持续升高" * 60
    with pytest.raises(ConfigError, match=r"question q7 has an option of \d+ tokens, .* has 128"):
        engine.run([Loglikelihood("q7", "?", ("A", option))])


def test_rolling_loglikelihood_counts_tokens_and_characters(engine: EvalEngine):
    text = "什么是高血压?血压持续升高。"
    response = run_one(engine, RollingLoglikelihood("x", text))
    assert isinstance(response, RollingLoglikelihoodResponse)
    ids, characters = encode_text(engine.tokenizer, text)
    first = engine.tokenizer.decode(ids[:1])
    assert (response.tokens, response.characters) == (len(ids) - 1, len(text) - len(first))
    assert response.characters == characters
    assert response.nll == pytest.approx(-plain_logprob(engine, ids, len(ids) - 1), abs=1e-3)


def test_an_empty_text_has_no_loglikelihood(engine: EvalEngine):
    assert run_one(engine, RollingLoglikelihood("x", "")) == RollingLoglikelihoodResponse(
        "x", 0, 0, 0
    )


def test_a_sampled_reply_does_not_depend_on_the_others(engine: EvalEngine):
    requests = [
        Generate(f"id{i}", (Message("user", "高血压" * (1 + i % 3)),), 12, 1.0, samples=2, seed=5)
        for i in range(7)
    ]
    together = {response.id: response for response in engine.run(requests)}
    for request in (requests[0], requests[5]):
        alone = run_one(engine, request)
        assert alone == together[request.id]
        assert isinstance(alone, GenerateResponse)
        assert alone.texts[0] != alone.texts[1]
    (other,) = engine.run([Generate("id0", requests[0].prompt, 12, 1.0, samples=2, seed=6)])
    assert other != together["id0"]


def test_a_reply_records_whether_it_finished(engine: EvalEngine):
    def reply(ends: list[int]) -> tuple[str, bool]:
        prompts = [encode_prompt(engine.tokenizer, "高血压")]
        options = {"max_new_tokens": 3, "temperature": 0.0, "seeds": [0]}
        return generate_responses(engine.model, engine.tokenizer, prompts, ends, **options)[0]

    assert not reply([len(engine.tokenizer) - 1])[1]
    assert reply(list(range(len(engine.tokenizer)))) == ("", True)


def test_max_new_tokens_must_leave_room_for_a_prompt(engine: EvalEngine):
    with pytest.raises(ConfigError, match="max_new_tokens=128 leaves no room"):
        engine.run([Generate("x", "高血压", 128)])


def test_an_untrained_model_has_the_same_architecture_and_weights_drawn_from_the_seed(
    tmp_path: Path,
):
    model, tokenizer = model_with_tokenizer(TEXTS, 800, max_positions=128)
    model.save_pretrained(tmp_path)
    prepare_chat_tokenizer(tokenizer).save_pretrained(tmp_path)
    options = {"precision": "auto", "pool": EvalPoolConfig()}
    trained = EvalEngine(str(tmp_path), **options)
    one, same, other = (EvalEngine(str(tmp_path), **options, fresh_seed=seed) for seed in (1, 1, 2))
    texts = [RollingLoglikelihood("x", "血压持续升高。" * 3)]
    assert one.run(texts) == same.run(texts)
    assert len({engine.run(texts)[0].nll for engine in (trained, one, other)}) == 3
    assert one.model.config.to_dict() == trained.model.config.to_dict()


def test_a_model_without_weights_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="no model in"):
        EvalEngine(str(tmp_path), precision="auto", pool=EvalPoolConfig())

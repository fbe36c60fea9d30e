"""Where generated ids become an answer: after the thought, or nowhere."""

import pytest

from medgpt.data.sources.records import Conversation, Message
from medgpt.data.tokenized.chat_template import CHATML, generation_prompt_ids, stop_token_ids
from medgpt.data.tokenized.encode import ConversationEncoder, EncodedSample
from medgpt.data.tokenized.render_template import render
from medgpt.models.answers import (
    answer_text,
    end_of_thought_ids,
    generate_within_budget,
    is_thinking,
    message_content,
)
from medgpt.models.decode import TokenGenerator
from medgpt.models.generate import generate_responses
from medgpt.models.prompts import encode_prompt_options
from tests.models.chat_templates import CHAT_TEMPLATES
from tests.models.chat_tokenizers import chat_tokenizer
from tests.models.tiny_models import model_with_tokenizer

QUESTION = (Message("user", "我头痛"),)
THOUGHT = "<think>\n先排除危险信号。\n</think>\n\n"
ORIGIN = {"source": "clinic", "file": "a.jsonl", "row": 7}
FAMILIES = [family for family in CHAT_TEMPLATES if family != "qwen3.5-nothink"]  # cannot think


def learned(tokenizer, content):
    """The prompt and the ids that a model learns to answer, without the end token."""
    messages = (*QUESTION, Message("assistant", content))
    sample = ConversationEncoder(tokenizer, 2048)(Conversation(messages=messages, **ORIGIN))
    assert isinstance(sample, EncodedSample)
    start = int(sample.targets.argmax())
    ids = sample.input_ids.tolist()
    return ids[:start], ids[start : start + int(sample.targets.sum()) - 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_is_what_follows_the_thought(family):
    tokenizer = chat_tokenizer(family)
    prompt, ids = learned(tokenizer, f"{THOUGHT}请测量体温。")
    assert answer_text(tokenizer, prompt, ids).strip() == "请测量体温。"
    prompt, plain = learned(tokenizer, "请测量体温。")
    assert answer_text(tokenizer, prompt, plain).strip() == "请测量体温。"
    in_thought = ids[: len(ids) // 2]
    for number in range(2, len(in_thought)):
        text = tokenizer.decode(ids[:number])
        if "排除" in text and "。" not in text:
            assert is_thinking(tokenizer, prompt, ids[:number])
            assert answer_text(tokenizer, prompt, ids[:number]) == ""
            return
    raise AssertionError("no ids end inside the thought")


@pytest.mark.parametrize("family", ["qwen3", "deepseek-r1", "qwen2.5", "gpt-oss"])
def test_a_thought_can_be_ended_at_any_token(family):
    tokenizer = chat_tokenizer(family)
    prompt, ids = learned(tokenizer, f"{THOUGHT}请测量体温。")
    answer = tokenizer("休息。", add_special_tokens=False)["input_ids"]
    cut = next(n for n in range(len(ids)) if "排除" in tokenizer.decode(ids[:n]))
    assert is_thinking(tokenizer, prompt, ids[:cut])
    ended = [*ids[:cut], *end_of_thought_ids(tokenizer)]
    assert answer_text(tokenizer, prompt, [*ended, *answer]).strip() == "休息。"
    assert not is_thinking(tokenizer, prompt, ended)


def test_a_thought_that_is_too_long_is_no_answer():
    tokenizer = chat_tokenizer("qwen3")
    prompt, ids = learned(tokenizer, f"{THOUGHT}请测量体温。")
    assert answer_text(tokenizer, prompt, ids, thinking_tokens=5) == ""
    assert answer_text(tokenizer, prompt, ids, thinking_tokens=len(ids)).strip() == "请测量体温。"


@pytest.mark.parametrize("family", ["qwen3", "deepseek-r1", "qwen2.5"])
def test_a_chat_goes_on_as_the_data_would(family):
    tokenizer = chat_tokenizer(family)
    content = f"{THOUGHT}请测量体温。"
    prompt, ids = learned(tokenizer, content)
    assert message_content(tokenizer, prompt, ids) == content


def test_options_are_scored_after_an_empty_thought():
    tokenizer = chat_tokenizer("qwen3")
    prompt = encode_prompt_options(tokenizer, QUESTION, ["A", "B"]).prompt
    assert str(tokenizer.decode(list(prompt))).endswith("assistant\n<think>\n\n</think>\n\n")
    assert list(prompt) == generation_prompt_ids(tokenizer, QUESTION, thinking=False)


def test_generation_is_the_same_with_a_budget_that_nobody_needs():
    model, tokenizer = model_with_tokenizer(["我头痛，请测量体温。"] * 3)
    model.set_attn_implementation("sdpa")
    assert tokenizer.chat_template == CHATML
    prompts, stops = [generation_prompt_ids(tokenizer, QUESTION)] * 2, stop_token_ids(tokenizer)
    options = {"max_new_tokens": 6, "temperature": 0.0, "seeds": [0, 1]}
    plain = generate_responses(model, tokenizer, prompts, stops, **options)
    bounded = generate_responses(model, tokenizer, prompts, stops, thinking_tokens=20, **options)
    assert plain == bounded


def test_a_thought_over_its_budget_is_ended_and_the_answer_follows():
    model, tokenizer = model_with_tokenizer(["我头痛，请测量体温。"] * 3)
    model.set_attn_implementation("sdpa")
    opened = CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'")
    tokenizer.chat_template = opened
    assert render(tokenizer, QUESTION, add_generation_prompt=True).endswith("<think>\n")
    prompt, ended = generation_prompt_ids(tokenizer, QUESTION), end_of_thought_ids(tokenizer)
    (response,) = generate_within_budget(
        TokenGenerator(model),
        tokenizer,
        [prompt],
        [0],
        thinking_tokens=3,
        max_new_tokens=3 + len(ended) + 4,
        temperature=0.0,
        stop_token_ids=[],
    )
    assert response.ids[3 : 3 + len(ended)] == ended
    assert len(response.ids) == len(response.logprobs) == 3 + len(ended) + 4
    text = str(tokenizer.decode(response.ids[3 + len(ended) :], skip_special_tokens=True))
    assert answer_text(tokenizer, prompt, response.ids).strip() == text.strip()

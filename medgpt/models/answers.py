"""Turns generated ids into the text of an answer, and bounds the thought before it."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from medgpt.data.tokenized.answer_format import find_answer_format
from medgpt.data.tokenized.render_template import continuation_ids, special_tokens
from medgpt.data.tokenized.thoughts import (
    THINK_END,
    THINK_START,
    opens_thought,
    split_thought,
    text_after_thought,
)
from medgpt.models.decode import GeneratedResponse, TokenGenerator

_PROMPT_END = 8  # tokens of a prompt's end, enough to see whether it begins a thought


def decode_text(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of generated ids, without special tokens and surrounding whitespace."""
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def answer_text(
    tokenizer: PreTrainedTokenizerFast,
    prompt_ids: Sequence[int],
    ids: Sequence[int],
    *,
    thinking_tokens: int | None = None,
) -> str:
    """Return the answer in generated ids: the text after the thought, without special tokens.

    A thought that did not end, or has more than `thinking_tokens`, is no answer: the text is empty.
    """
    text = _decode_all(tokenizer, ids)
    answer = text_after_thought(text, starts_inside=_begins_thought(tokenizer, prompt_ids))
    if answer == text:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))
    if thinking_tokens is not None and is_thinking(tokenizer, prompt_ids, ids[:thinking_tokens]):
        return ""
    for token in special_tokens(tokenizer):
        answer = answer.replace(token, "")
    return answer.strip()


def message_content(
    tokenizer: PreTrainedTokenizerFast, prompt_ids: Sequence[int], ids: Sequence[int]
) -> str:
    """Return the generated text as the content of a message: a thought in tags, then the answer.

    Empty if there is no answer. The thoughts of gpt-oss, which no later turn shows, are left out.
    """
    answer = answer_text(tokenizer, prompt_ids, ids).strip()
    thought = split_thought(decode_text(tokenizer, ids)).thought
    if not answer or not thought:
        return answer
    return f"{THINK_START}\n{thought}\n{THINK_END}\n\n{answer}"


def is_thinking(
    tokenizer: PreTrainedTokenizerFast, prompt_ids: Sequence[int], ids: Sequence[int]
) -> bool:
    """Whether the generated ids end inside a thought."""
    text = _decode_all(tokenizer, ids)
    inside = _begins_thought(tokenizer, prompt_ids)
    has_thought = inside or THINK_START in text or "<|channel|>analysis" in text
    return has_thought and not text_after_thought(f"{text}.", starts_inside=inside)


def end_of_thought_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids that end a thought and begin the answer."""
    thought = find_answer_format(tokenizer).thought
    return continuation_ids(tokenizer, thought[1] if thought else f"\n{THINK_END}\n\n")


def generate_within_budget(
    generator: TokenGenerator,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    *,
    thinking_tokens: int,
    max_new_tokens: int,
    **options: Any,
) -> list[GeneratedResponse]:
    """Generate as TokenGenerator does; a thought of more than `thinking_tokens` is ended there.

    The ids that end it count as generated, with a log-probability of 0.
    """
    budget = min(thinking_tokens, max_new_tokens)
    responses = generator.generate(prompts, seeds, max_new_tokens=budget, **options)
    end_ids = end_of_thought_ids(tokenizer)
    num_left = max_new_tokens - budget - len(end_ids)
    unfinished = [i for i, response in enumerate(responses) if not response.finished]
    if num_left < 1 or not unfinished:
        return responses
    begun = []
    for i in unfinished:
        ids, logprobs = responses[i].ids, responses[i].logprobs
        ended = end_ids if is_thinking(tokenizer, prompts[i], ids) else []
        begun.append(GeneratedResponse([*ids, *ended], [*logprobs, *[0.0] * len(ended)], False))
    more = generator.generate(
        [[*prompts[i], *start.ids] for i, start in zip(unfinished, begun, strict=True)],
        [seeds[i] + 1 for i in unfinished],
        max_new_tokens=num_left,
        **options,
    )
    for i, start, rest in zip(unfinished, begun, more, strict=True):
        ids, logprobs = [*start.ids, *rest.ids], [*start.logprobs, *rest.logprobs]
        responses[i] = GeneratedResponse(ids, logprobs, rest.finished)
    return responses


def _begins_thought(tokenizer: PreTrainedTokenizerFast, prompt_ids: Sequence[int]) -> bool:
    return opens_thought(_decode_all(tokenizer, list(prompt_ids[-_PROMPT_END:])))


def _decode_all(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False)

"""Encode prompts and their answer options as token ids."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from medgpt.data.sources.records import Message
from medgpt.data.tokenized.answer_format import find_answer_format
from medgpt.data.tokenized.chat_template import generation_prompt_ids
from medgpt.data.tokenized.render_template import continuation_ids
from medgpt.models.loglikelihood import PromptOptions
from medgpt.models.tokenizer import common_prefix_length, end_token_id

Prompt = str | Sequence[Message]


def encode_prompt(
    tokenizer: PreTrainedTokenizerFast, prompt: Prompt, thinking: bool | None = None
) -> list[int]:
    """Encode a text after the tokenizer's start token, if any, or messages by the chat template.

    Args:
        thinking: whether the model shall think before it answers messages; None is the template's
            default.
    """
    if not isinstance(prompt, str):
        return generation_prompt_ids(tokenizer, prompt, thinking=thinking)
    return [*_start_ids(tokenizer), *_encode(tokenizer, [prompt])[0]]


def encode_prompt_options(
    tokenizer: PreTrainedTokenizerFast, prompt: Prompt, options: Sequence[str]
) -> PromptOptions:
    """Encode a prompt and its options.

    An option is encoded together with a text prompt, because a token can span the end of the
    prompt and the start of the option. Prompt tokens that differ between options are moved to the
    options. An option answers messages without a thought.
    """
    if not isinstance(prompt, str):
        return PromptOptions(
            tuple(_prompt_of_answer(tokenizer, prompt)),
            tuple(map(tuple, _encode(tokenizer, options))),
        )
    prompt_alone, *with_options = _encode(
        tokenizer, [prompt, *(prompt + option for option in options)]
    )
    num_shared = common_prefix_length([prompt_alone, *with_options])
    start = _start_ids(tokenizer) or ([] if num_shared else [end_token_id(tokenizer)])
    return PromptOptions(
        (*start, *prompt_alone[:num_shared]), tuple(tuple(ids[num_shared:]) for ids in with_options)
    )


def _prompt_of_answer(tokenizer: PreTrainedTokenizerFast, prompt: Sequence[Message]) -> list[int]:
    """Return the prompt with what stands before an answer without a thought, such as its empty
    thought."""
    answer_format = find_answer_format(tokenizer)
    ids = generation_prompt_ids(tokenizer, prompt)
    before = answer_format.before
    return ids + continuation_ids(tokenizer, before) if before.strip() else ids


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[list[int], int]:
    """Encode a text after the tokenizer's start token, if any; return ids and number of characters.

    The number counts the characters of all tokens but the first, which nothing predicts.
    """
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    start = _start_ids(tokenizer)
    if start or len(ids) < 2:
        return [*start, *ids], len(text) if start else 0
    return ids, len(text) - offsets[0][1]


def _encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def _start_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the start token that the tokenizer puts before every text; empty if it has none."""
    return [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id]

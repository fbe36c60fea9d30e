"""Prompts and what may follow them, as token ids."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from medgpt.data.sources.records import Message
from medgpt.data.tokenized.chat import generation_ids
from medgpt.models.scoring import Choice

Prompt = str | Sequence[Message]


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> list[int]:
    """A text after the tokenizer's own start token, if it has one; messages by its template."""
    if not isinstance(prompt, str):
        return generation_ids(tokenizer, prompt)
    return [*_start(tokenizer), *_plain(tokenizer, [prompt])[0]]


def choice_ids(
    tokenizer: PreTrainedTokenizerFast, prompt: Prompt, options: Sequence[str]
) -> Choice:
    """The prompt and its options.

    After a text, an option is spelled as it would be there, which can join its beginning and the
    prompt's end in one token: what is not the same in all of them belongs to the options.
    """
    if not isinstance(prompt, str):
        return Choice(
            tuple(generation_ids(tokenizer, prompt)), tuple(map(tuple, _plain(tokenizer, options)))
        )
    alone, *whole = _plain(tokenizer, [prompt, *(prompt + option for option in options)])
    same = min(_same(alone, ids) for ids in whole)
    start = _start(tokenizer) or ([] if same else [end_id(tokenizer)])
    return Choice((*start, *alone[:same]), tuple(tuple(ids[same:]) for ids in whole))


def end_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token that ends a text, which some models also see before one."""
    end = tokenizer.eos_token_id
    assert isinstance(end, int), "load_base takes no tokenizer without an end token"
    return end


def text_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[list[int], int]:
    """Token ids of a text after the tokenizer's own start token, if it has one, and how many
    characters all but the first of them stand for."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    start = _start(tokenizer)
    if start or len(ids) < 2:
        return [*start, *ids], len(text) if start else 0
    return ids, len(text) - offsets[0][1]


def _plain(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def _start(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """What the tokenizer puts in front of every text: its start token, or nothing."""
    return [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id]


def _same(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))

"""Splits records into training and validation by the hash of their content."""

import json
from collections.abc import Sequence
from typing import Any

import xxhash

from medgpt.data.sources.records import Document, Message, Preferences, Record


def content_hash(record: Record) -> str:
    """Return a hash of the content as 32 hexadecimal characters, independent of file and row."""
    if isinstance(record, Document):
        return _hash(record.text)
    content: list[Any] = _turns(record.messages)
    if isinstance(record, Preferences):
        answers = [_turns(answer) for answer in record.answers]
        content = [len(record.prompt), content, answers, record.grades]
    if record.tools is not None:  # not a key of every record, so that others keep their hash
        content = [*content, {"tools": record.tools}]
    return _hash(json.dumps(content, ensure_ascii=False))


def part_hash(content: str, turn: int) -> str:
    """Return the hash of one of several samples of a record: the one that ends with this turn."""
    return _hash(f"{content}:{turn}")


def is_validation(record: Record, content: str, share: float) -> bool:
    """Whether a record with this content hash falls into the validation split.

    Equal contents, and preferences about one prompt, always fall into the same split.
    """
    if isinstance(record, Preferences):
        content = _hash(json.dumps(_turns(record.prompt), ensure_ascii=False))
    return int(content[:8], 16) < share * 2**32


def _turns(messages: Sequence[Message]) -> list[list[Any]]:
    return [message.to_list() for message in messages]


def _hash(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))

"""Parses single rows in tests of row formats."""

from typing import Any

from medgpt.config.data import SourceConfig
from medgpt.config.loading import validate
from medgpt.data.sources.records import Conversation, Origin, Preferences, Record, Reject
from medgpt.data.sources.row_formats import RowParser

ORIGIN = Origin(source="s", file="f.jsonl", row=7)


def parse_row(row: dict[str, Any], **changes: object) -> Record | Reject:
    """Parse a row of a source with these keys."""
    values = {"name": "s", "paths": ["x"], "license": "MIT", **changes}
    return RowParser(validate(SourceConfig, values))(row, ORIGIN)


def conversation(row: dict[str, Any], **changes: object) -> Conversation:
    item = parse_row(row, **changes)
    assert isinstance(item, Conversation), item
    return item


def preferences(row: dict[str, Any], **changes: object) -> Preferences:
    item = parse_row(row, **changes)
    assert isinstance(item, Preferences), item
    return item


def reject(row: dict[str, Any], **changes: object) -> Reject:
    item = parse_row(row, **changes)
    assert isinstance(item, Reject), item
    return item

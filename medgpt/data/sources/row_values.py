"""Checks of single values of a raw row, with errors that name columns and rules, never values."""

import json
import math
from typing import Any

from medgpt.data.sources.clean import clean_text

RawRow = dict[str, Any]
MAX_NAME = 32  # characters; a file without a header has values instead of names


class MalformedRow(Exception):
    """The row cannot be trained on. The message names columns and rules, never values."""


class UnusableRow(MalformedRow):
    """The row is valid but has nothing to learn from."""


def json_type(value: object) -> str:
    """Return the JSON type of `value` in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def shown_name(name: object) -> str:
    """Return the name of a key, unless it is as long as a value."""
    text = str(name)
    return text if len(text) <= MAX_NAME else f"<{len(text)} characters>"


def is_empty(value: object) -> bool:
    """Whether a value says nothing: null, or a text, list or object without content."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, (list, tuple)):
        return all(map(is_empty, value))
    if isinstance(value, dict):
        return all(map(is_empty, value.values()))
    return value is None or (isinstance(value, float) and math.isnan(value))


def require_text(value: object, location: str) -> str:
    """Return the cleaned text. Raises MalformedRow if it is empty or not a text."""
    if not isinstance(value, str):
        raise MalformedRow(f"{location} is {json_type(value)}, must be text")
    text = clean_text(value)
    if not text:
        raise MalformedRow(f"{location} is empty")
    return text


def require_column(row: RawRow, column: str) -> Any:
    if column not in row:
        raise MalformedRow(f"column {column} is missing")
    return row[column]


def require_list(row: RawRow, column: str) -> list[Any]:
    """Return the list in a column, or raise MalformedRow. A CSV cell holds it as JSON."""
    value = require_column(row, column)
    if isinstance(value, str):
        value = parse_json(value, f"column {column}", "must be a list")
    if not isinstance(value, list):
        raise MalformedRow(f"column {column} is {json_type(value)}, must be a list")
    if not value:
        raise MalformedRow(f"column {column} is empty")
    return value


def parse_json(text: str, location: str, rule: str) -> Any:
    """Return the value of a JSON text. Raises MalformedRow if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise MalformedRow(f"{location} is text that is not JSON, {rule}") from None

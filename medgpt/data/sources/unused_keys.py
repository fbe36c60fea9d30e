"""Decides what becomes of columns and turn keys that nothing reads: an error, or a count."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from medgpt.data.sources.row_values import MalformedRow, is_empty, shown_name

MEDIA = ("image", "video", "audio", "speech")
MEANINGFUL_KEYS = frozenset(
    [
        *(f"{name}{suffix}" for name in MEDIA for suffix in ("", "s", "_path", "_paths", "_url")),
        *("objects", "bbox", "tools", "functions", "tool_calls", "function_call", "kto_tag"),
        *("loss", "loss_scale", "loss_weight", "loss_mask", "train_detail"),
    ]
)
"""Keys that change what a row means: a row that has one which is not read is malformed."""


class UnusedKeys:
    """The keys of one row that nothing read."""

    def __init__(self, ignore: Collection[str], *, mapped: bool) -> None:
        """`mapped`: the config names what is read, so that other keys of turns are only counted."""
        self._ignore, self._mapped = ignore, mapped
        self._used: set[str] = set()
        self.names: set[str] = set()
        """Columns and turn keys with content that nothing read, as `column x` or `turn key x`."""

    def drop_ignored(self, values: Mapping[str, Any], what: str) -> dict[str, Any]:
        """Return `values` without the keys that the config ignores."""
        self._count([key for key in values if key in self._ignore], values, what)
        return {key: value for key, value in values.items() if key not in self._ignore}

    def without_counts(self) -> "UnusedKeys":
        """Return the same rules with counts of their own."""
        return UnusedKeys(self._ignore, mapped=self._mapped)

    def for_part(self, *columns: str) -> "UnusedKeys":
        """Return the same rules and counts for an object in the row, of which `columns` are read
        and those that are read of the row, which it may repeat."""
        part = self.without_counts()
        part.names = self.names
        part.use(*self._used, *columns)
        return part

    def is_ignored(self, name: object) -> bool:
        """Whether the config ignores this key."""
        return name in self._ignore

    def use(self, *columns: str) -> None:
        """Note that these columns are read, if the row has them."""
        self._used.update(columns)

    def is_used(self, *columns: str) -> bool:
        """Whether one of these columns is read."""
        return not self._used.isdisjoint(columns)

    def check_columns(self, row: Mapping[str, Any]) -> None:
        """Count the columns that are not used. Raises MalformedRow for one with a meaning."""
        unused = [name for name in row if name not in self._used]
        for name in unused:
            if name in MEANINGFUL_KEYS and not is_empty(row[name]) and row[name] is not True:
                raise MalformedRow(
                    f"column {name} is not used; set ignore=[{name!r}] for the source to train on "
                    "its rows without it"
                )
        self._count(unused, row, "column")

    def check_turn(
        self, turn: Mapping[Any, Any], used: Collection[str | int], location: str
    ) -> None:
        """Count unknown keys of a turn if a mapping names the keys, else raise MalformedRow."""
        unused = [key for key in turn if key not in used and not is_empty(turn[key])]
        for key in unused:
            if not self._mapped or key in MEANINGFUL_KEYS:
                name = shown_name(key)
                raise MalformedRow(
                    f"{location} has the unknown key {name}; set ignore=[{name!r}] for the source "
                    "to train on its rows without it"
                )
        self._count(unused, turn, "turn key")

    def _count(self, names: Iterable[Any], values: Mapping[Any, Any], what: str) -> None:
        self.names.update(f"{what} {shown_name(n)}" for n in names if not is_empty(values[n]))

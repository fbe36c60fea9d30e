"""Values that a search may give to a key."""

from collections.abc import Iterator
from typing import Annotated, Any, Self

from annotated_types import Gt, Len
from pydantic import model_validator

from medgpt.config.base import Config

Value = bool | int | float | str
SPACE_KINDS = ("uniform", "loguniform", "randint", "choice", "grid")
INNER_POINT = 0.381966  # of a range, never a whole number


class SearchSpace(Config):
    """Values of a searched key: a table with one of these. Write the key in quotes: `"ppo.kl_coef"
    = { loguniform = [1e-3, 0.3] }`."""

    uniform: tuple[float, float] | None = None
    """Any number between the two."""
    loguniform: tuple[Annotated[float, Gt(0)], Annotated[float, Gt(0)]] | None = None
    """Any number between the two, uniform in its logarithm."""
    randint: tuple[int, int] | None = None
    """Any integer from the first to the last."""
    choice: Annotated[tuple[Value, ...], Len(1)] | None = None
    """One of these."""
    grid: Annotated[tuple[Value, ...], Len(1)] | None = None
    """All of these, combined with those of the other keys; needs tune.searcher=grid."""

    @model_validator(mode="after")
    def _check_one_kind(self) -> Self:
        given = [kind for kind in SPACE_KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            has = " and ".join(given) or "none"  # the file and an override together may set several
            raise ValueError(
                f"has {has}; needs one of {', '.join(SPACE_KINDS)}, as {{ choice = [1] }}"
            )
        if self.bounds is not None and self.bounds[0] >= self.bounds[1]:
            raise ValueError(f"{given[0]} needs the lower end first, as [0.1, 1.0]")
        return self

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Ends of a range; None if the values are listed."""
        return self.uniform or self.loguniform or self.randint

    @property
    def values(self) -> tuple[Value, ...] | None:
        """All values if they are listed, else None."""
        return self.choice or self.grid

    @property
    def values_to_check(self) -> tuple[Value, ...]:
        """Values that must be valid for all to be: the ends of a range and one between them."""
        if self.values is not None:
            return self.values
        assert self.bounds is not None
        low, high = self.bounds
        return self.bounds if self.randint else (low, high, low + INNER_POINT * (high - low))

    def __contains__(self, value: object) -> bool:
        if self.values is not None:
            return value in self.values
        assert self.bounds is not None
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return self.bounds[0] <= value <= self.bounds[1]

    def clip(self, value: Any) -> Any:
        """Return `value` clipped to the range."""
        if self.bounds is None:
            return value
        return type(value)(min(max(value, self.bounds[0]), self.bounds[1]))


def flatten_spaces(tree: object) -> object:
    """Flatten nested tables, which `ppo.kl_coef = {...}` makes, to tables under dotted keys."""
    if not isinstance(tree, dict):
        return tree

    def leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
        is_table = (
            isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values())
        )
        if is_table and not value.keys() & set(SPACE_KINDS):
            for name, inner in value.items():
                yield from leaves(f"{path}.{name}", inner)
        else:
            yield path, value

    return {name: space for key, value in tree.items() for name, space in leaves(key, value)}

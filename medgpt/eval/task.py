"""What a task is: questions to a model, and what its responses are worth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from medgpt.eval.requests import Request, Response
from medgpt.eval.stats import Interval

Value = float | tuple[float, float]
"""A ratio of sums is given as (numerator, denominator); a plain number v is (v, 1)."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What one item is worth. A metric that does not apply to it is not among its values."""

    id: str
    values: dict[str, Value]
    slices: dict[str, str] = field(default_factory=dict)
    shown: dict[str, str] = field(default_factory=dict)  # for reports; never of a sensitive task


class Task(Protocol):
    """Made from its config by `medgpt.eval.evaluate.TASKS`."""

    name: str
    kind: str
    data_hash: str  # of the items
    template: str  # version of the prompt's text
    sensitive: bool

    def requests(self) -> Sequence[Request]:
        """What to ask. Ids differ within a task."""
        ...

    def judge(self, responses: Mapping[str, Response]) -> list[Judged]:
        """One for each item, from the responses to all requests by id."""
        ...


@runtime_checkable
class CorpusTask(Task, Protocol):
    """A task that also has scores of all its responses together, as BLEU."""

    def corpus(self, responses: Mapping[str, Response], seed: int) -> dict[str, Interval]:
        """By metric."""
        ...

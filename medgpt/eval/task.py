"""What a task is: questions to a model, and what its responses are worth."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Protocol, runtime_checkable

from medgpt.data.sources.sampling import hash_texts
from medgpt.eval.requests import Generate, Loglikelihood, Request, Response
from medgpt.eval.stats import Interval

MetricValue = float | tuple[float, float]
"""A ratio of sums is given as (numerator, denominator); a plain number v is (v, 1)."""


@dataclass(frozen=True, slots=True)
class ItemResult:
    """What one item is worth. A metric that does not apply to it is not among its values."""

    id: str
    values: dict[str, MetricValue]
    slices: dict[str, str] = field(default_factory=dict)
    shown: dict[str, str] = field(default_factory=dict)  # for reports; never of a sensitive task
    counts: dict[str, list[float]] = field(default_factory=dict)  # what a CorpusTask adds up


class Task(Protocol):
    """Made from its config by `medgpt.stages.evaluate.TASKS`."""

    name: str
    kind: str
    data_hash: str  # of the items
    template: str  # version of the prompt's text
    rules: str  # version of what reads the answers, see `rules_of`
    sensitive: bool

    def requests(self) -> Sequence[Request]:
        """What to ask. Ids differ within a task."""
        ...

    def grade(self, responses: Mapping[str, Response]) -> list[ItemResult]:
        """One for each item, from the responses to all requests by id."""
        ...


@runtime_checkable
class CorpusTask(Task, Protocol):
    """A task that also has scores of all its responses together, as BLEU."""

    corpus_metrics: tuple[str, ...]

    def corpus_scores(self, items: Sequence[ItemResult], seed: int) -> dict[str, Interval]:
        """By metric, from the counts of all items."""
        ...


NO_RULES = "likelihood"  # the rules of a task that reads no answers


def rules_digest(*modules: ModuleType) -> str:
    """A digest of the source of what judges: with other rules, scores do not compare."""
    return hash_texts(*(inspect.getsource(module) for module in modules))


def uses_chat_template(task: Task) -> bool:
    return any(
        isinstance(request, Loglikelihood | Generate) and not isinstance(request.prompt, str)
        for request in task.requests()
    )

"""The interface of an evaluation task: requests to a model, and the grading of its responses."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Protocol, runtime_checkable

from medgpt.data.sources.sampling import hash_texts
from medgpt.eval.requests import Generate, Loglikelihood, Request, Response, repr_as
from medgpt.eval.stats import Interval

MetricValue = float | tuple[float, float]
"""The terms (numerator, denominator) of a ratio of sums; a number v stands for (v, 1)."""


@dataclass(frozen=True, slots=True)
class ItemResult:
    """Scores of one item; metrics that do not apply to it are missing from `values`."""

    id: str
    values: dict[str, MetricValue]
    slices: dict[str, str] = field(default_factory=dict)
    shown: dict[str, str] = field(default_factory=dict)  # texts for reports
    counts: dict[str, list[float]] = field(default_factory=dict)  # of a CorpusTask


class Task(Protocol):
    """A task of an evaluation; `medgpt.eval.preparation` builds it from its config."""

    name: str
    kind: str
    data_hash: str  # hash of the items
    template: str  # version of the prompt
    rules: str  # version of the code that grades the answers, see `rules_digest`
    sensitive: bool

    def requests(self) -> Sequence[Request]:
        """Return the requests, with ids that are unique within the task."""
        ...

    def grade(self, responses: Mapping[str, Response]) -> list[ItemResult]:
        """Return one result per item from the responses by request id."""
        ...


@runtime_checkable
class CorpusTask(Task, Protocol):
    """A task with metrics of all its responses together, such as BLEU."""

    corpus_metrics: tuple[str, ...]

    def corpus_scores(self, items: Sequence[ItemResult], seed: int) -> dict[str, Interval]:
        """Return the corpus metrics from the counts of all items."""
        ...


NO_RULES = "likelihood"  # `rules` of a task that grades likelihoods, not texts


def rules_digest(*modules: ModuleType) -> str:
    """Return a digest of the source code that grades; other code makes scores incomparable."""
    return hash_texts(*(inspect.getsource(module) for module in modules))


def questions_hash(questions: Iterable[object]) -> str:
    """Return a hash of questions, whose classes files on disk know as `Question`."""
    return hash_texts(*(repr_as("Question", question) for question in questions))


def uses_chat_template(task: Task) -> bool:
    return any(
        isinstance(request, Loglikelihood | Generate) and not isinstance(request.prompt, str)
        for request in task.requests()
    )

"""Tables of the scores of one or more evaluations, side by side, for the reports."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from medgpt.eval.gates import MAIN_METRICS, why_not_comparable
from medgpt.eval.results import LENGTH_METRICS
from medgpt.eval.stats import Comparison, compare_runs
from medgpt.eval.task import ItemResult, MetricValue
from medgpt.eval.tasks.text_metrics import BLEU_METRICS, DISTINCT_METRICS, corpus_difference

EQUIVALENCE_MARGIN = (
    0.01  # in shares or nats: a difference whose interval lies within it counts as none
)
BLEU_EQUIVALENCE_MARGIN = 1.0  # BLEU is in percent
NUM_SHOWN_ANSWERS = 3  # best answers, and as many worst
LOWER_IS_BETTER = {
    *("nll_per_token", "nll_per_character", "invalid_rate", "refused_rate", "cut_rate"),
    *("under", "over", "less_urgent", "more_urgent", "over_refusal", "premise_accepted"),
    *("repetition", "judge/triage_under", "judge/triage_over", "rewards/capped"),
    "validation/loss",
}
NO_DIRECTION = {*LENGTH_METRICS, "chance", "rollout/response_tokens", "actor/kl_ref"}
ANSWER_RANKING_METRICS = {  # metrics that rank the answers of a task
    "mcq": ("accuracy",),
    "generation": ("rouge_l",),
    "key_points": ("passed", "stated"),
    "triage": ("accuracy",),
    "safety": ("harmful_refused", "benign_answered", "premise_corrected"),
}

Score = dict[str, float]


def equivalence_margin(metric: str) -> float:
    """Return the largest difference of a metric that counts as none."""
    if metric in LENGTH_METRICS:
        return 0.0
    return BLEU_EQUIVALENCE_MARGIN if metric in BLEU_METRICS else EQUIVALENCE_MARGIN


def classify_change(metric: str, change: float, noise: float = 0.0) -> str:
    """Return "better" or "worse" if the metric changed by more than `noise`, else ""."""
    if metric in NO_DIRECTION or abs(change) <= noise:
        return ""
    return "better" if (change < 0) == (metric in LOWER_IS_BETTER) else "worse"


@dataclass(frozen=True)
class EvalColumn:
    """The results of one evaluation."""

    name: str
    results: dict[str, Any]
    items: dict[str, list[ItemResult]]  # by task


@dataclass(frozen=True)
class MetricRow:
    """A metric: its score in each column that has it, and its change from the previous column."""

    metric: str
    lower_is_better: bool
    scores: list[Score | None]
    changes: list[Comparison | None]
    verdicts: list[str]  # of the changes: better or worse, else as in Comparison
    low: float  # ends of the plot's axis
    high: float


@dataclass(frozen=True)
class SliceTable:
    name: str
    metric: str
    values: list[tuple[str, list[Score | None]]]


@dataclass(frozen=True)
class SharedAnswers:
    """The answers to one question in all columns that may show them."""

    score: float
    shown: list[tuple[str, dict[str, str]]]  # (column, fields to show)


@dataclass(frozen=True)
class TaskTable:
    task: str
    kind: str
    columns: list[str]
    facts: list[str]
    rows: list[MetricRow]
    slices: list[SliceTable]
    best: list[SharedAnswers]
    worst: list[SharedAnswers]


def build_task_tables(columns: Sequence[EvalColumn], seed: int) -> list[TaskTable]:
    """Return a table for each task, in the order of their first appearance."""
    tasks = dict.fromkeys(task for column in columns for task in column.results["tasks"])
    return [
        _task_table(task, [c for c in columns if task in c.results["tasks"]], seed)
        for task in tasks
    ]


def _task_table(task: str, columns: Sequence[EvalColumn], seed: int) -> TaskTable:
    parts = [column.results["tasks"][task] for column in columns]
    kind = parts[-1]["kind"]
    metrics = dict.fromkeys(metric for part in parts for metric in part["metrics"])
    columns_and_parts = list(zip(columns, parts, strict=True))
    facts = [_describe_column(column.name, part) for column, part in columns_and_parts]
    for (before, theirs), (now, ours) in pairwise(columns_and_parts):
        if reason := why_not_comparable(ours, theirs):
            facts.append(f"{now.name} is not compared with {before.name}, which {reason}")
    best, worst = _best_and_worst_answers(task, kind, columns)
    return TaskTable(
        task,
        kind,
        [column.name for column in columns],
        facts,
        [_metric_row(task, metric, columns, seed) for metric in metrics],
        _slice_tables(kind, parts),
        best,
        worst,
    )


def _describe_column(name: str, part: dict[str, Any]) -> str:
    template = part.get("chat_template")
    chat = f", chat template {template[:8]}" if template else ""
    return (
        f"{name}: n={part['n']}, data {part['data_hash']}, prompt {part['template']}{chat}, "
        f"read by {part.get('rules', 'older rules')}, seed {part['seed']}"
    )


def _metric_row(task: str, metric: str, columns: Sequence[EvalColumn], seed: int) -> MetricRow:
    scores = [column.results["tasks"][task]["metrics"].get(metric) for column in columns]
    known = [score for score in scores if score]
    low, high = min(s["low"] for s in known), max(s["high"] for s in known)
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    changes: list[Comparison | None] = [None] * len(columns)
    for number in range(1, len(columns)):
        changes[number] = _compare_columns(task, metric, columns[number - 1], columns[number], seed)
    verdicts = [_change_verdict(metric, change) for change in changes]
    return MetricRow(metric, metric in LOWER_IS_BETTER, scores, changes, verdicts, low, high)


def _change_verdict(metric: str, change: Comparison | None) -> str:
    verdict = "" if change is None else change.verdict
    sign = {"higher": 1, "lower": -1}.get(verdict, 0)
    return classify_change(metric, sign) or verdict


def _compare_columns(
    task: str, metric: str, before: EvalColumn, now: EvalColumn, seed: int
) -> Comparison | None:
    """Compare a metric of two columns; None if they are not comparable or one lacks the metric."""
    if why_not_comparable(now.results["tasks"][task], before.results["tasks"][task]):
        return None
    if metric in (*BLEU_METRICS, *DISTINCT_METRICS):
        return _compare_corpus_scores(task, metric, before, now, seed)
    ours, theirs = _item_values(now.items[task], metric), _item_values(before.items[task], metric)
    shared = ours.keys() & theirs.keys()
    if not any(ours[id][1] for id in shared) or not any(theirs[id][1] for id in shared):
        return None
    return compare_runs(ours, theirs, margin=equivalence_margin(metric), seed=seed)


def _compare_corpus_scores(
    task: str, metric: str, before: EvalColumn, now: EvalColumn, seed: int
) -> Comparison | None:
    """Compare a corpus-level score, such as BLEU, by a paired bootstrap."""
    scores = [column.results["tasks"][task]["metrics"].get(metric) for column in (now, before)]
    if None in scores:
        return None
    our_value, their_value = (score["value"] for score in scores)
    ours, theirs = ({i.id: i.counts for i in column.items[task]} for column in (now, before))
    assert ours.keys() == theirs.keys(), f"{task}: equal data have other items"
    difference = corpus_difference(metric, list(ours.values()), [theirs[id] for id in ours], seed)
    margin = equivalence_margin(metric)
    return Comparison(len(ours), our_value, their_value, difference, None, margin)


def _item_values(items: Sequence[ItemResult], metric: str) -> dict[str, tuple[float, float]]:
    return {item.id: _as_fraction(item.values[metric]) for item in items if metric in item.values}


def _as_fraction(value: MetricValue) -> tuple[float, float]:
    return (float(value), 1.0) if isinstance(value, int | float) else (value[0], value[1])


def _slice_tables(kind: str, parts: Sequence[dict[str, Any]]) -> list[SliceTable]:
    """Return a table for each slice with several values: the main metric, else the first one."""
    slice_tables = []
    names = dict.fromkeys(name for part in parts for name in part["slices"])
    for name in names:
        groups = [part["slices"].get(name, {}) for part in parts]
        values = sorted({value for group in groups for value in group})
        if len(values) < 2:
            continue
        rows_by_metric: dict[str, list[tuple[str, list[Score | None]]]] = {}
        for value in values:
            metrics = next(group[value] for group in groups if value in group)
            main_metric = MAIN_METRICS.get(kind)
            metric = main_metric if main_metric in metrics else next(iter(metrics), None)
            if metric is not None:
                scores = [group.get(value, {}).get(metric) for group in groups]
                rows_by_metric.setdefault(metric, []).append((value, scores))
        slice_tables += [SliceTable(name, metric, part) for metric, part in rows_by_metric.items()]
    return slice_tables


def _best_and_worst_answers(
    task: str, kind: str, columns: Sequence[EvalColumn]
) -> tuple[list[SharedAnswers], list[SharedAnswers]]:
    """Return the best and worst answers of the last column that may be shown."""
    ranking_metrics = ANSWER_RANKING_METRICS.get(kind, ())
    ranked = []
    for item in columns[-1].items[task]:
        pairs = [_as_fraction(item.values[name]) for name in ranking_metrics if name in item.values]
        if pairs and item.shown:
            mean = sum(a / b if b else 0.0 for a, b in pairs) / len(pairs)
            ranked.append((mean, item.id))
    ranked.sort(key=lambda pair: (-pair[0], pair[1]))
    shown = [(c.name, {i.id: i.shown for i in c.items[task] if i.shown}) for c in columns]
    answers = [
        SharedAnswers(score, [(name, by_id[id]) for name, by_id in shown if id in by_id])
        for score, id in ranked
    ]
    half = min(NUM_SHOWN_ANSWERS, len(answers) // 2)
    return answers[: len(answers) - half][:NUM_SHOWN_ANSWERS], answers[::-1][:half]

"""Scores of one or more evaluations side by side, as the reports show them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medgpt.eval.gates import MAIN
from medgpt.eval.stats import Comparison, compare
from medgpt.eval.task import Judged, Value

MARGIN = 0.01  # differences whose interval lies within it count as none
SHOWN_ANSWERS = 3  # best, and as many worst
LOWER_IS_BETTER = {
    *("nll_per_token", "nll_per_character", "invalid_rate", "refused_rate", "cut_rate"),
    *("under", "over", "less_urgent", "more_urgent", "over_refusal", "premise_accepted"),
    "repetition",
}
RANKED_BY = {  # what makes an answer good
    "mcq": ("accuracy",),
    "generation": ("rouge_l",),
    "key_points": ("passed", "stated"),
    "triage": ("accuracy",),
    "safety": ("harmful_refused", "benign_answered", "premise_corrected"),
}

Score = dict[str, float]


@dataclass(frozen=True)
class Column:
    """One evaluation."""

    name: str
    results: dict[str, Any]
    items: dict[str, list[Judged]]  # by task


@dataclass(frozen=True)
class Row:
    """One metric: a score in each column that has it, and the change over the column before."""

    metric: str
    lower_is_better: bool
    scores: list[Score | None]
    changes: list[Comparison | None]
    low: float  # of the plot's axis
    high: float


@dataclass(frozen=True)
class Slices:
    name: str
    metric: str
    values: list[tuple[str, list[Score | None]]]


@dataclass(frozen=True)
class Answers:
    """The same question in all columns that asked it and may show it."""

    score: float
    shown: list[tuple[str, dict[str, str]]]  # (column, what to show)


@dataclass(frozen=True)
class Table:
    task: str
    kind: str
    columns: list[str]
    facts: list[str]
    rows: list[Row]
    slices: list[Slices]
    best: list[Answers]
    worst: list[Answers]


def tables(columns: Sequence[Column], seed: int) -> list[Table]:
    """One for each task, in the order in which they appear."""
    tasks = dict.fromkeys(task for column in columns for task in column.results["tasks"])
    return [
        _table(task, [c for c in columns if task in c.results["tasks"]], seed) for task in tasks
    ]


def _table(task: str, columns: Sequence[Column], seed: int) -> Table:
    parts = [column.results["tasks"][task] for column in columns]
    kind = parts[-1]["kind"]
    metrics = dict.fromkeys(metric for part in parts for metric in part["metrics"])
    facts = [
        f"{column.name}: n={part['n']}, data {part['data_hash']}, prompt {part['template']}, "
        f"seed {part['seed']}"
        for column, part in zip(columns, parts, strict=True)
    ]
    best, worst = _answers(task, kind, columns)
    return Table(
        task,
        kind,
        [column.name for column in columns],
        facts,
        [_row(task, metric, columns, seed) for metric in metrics],
        _slices(kind, parts),
        best,
        worst,
    )


def _row(task: str, metric: str, columns: Sequence[Column], seed: int) -> Row:
    scores = [column.results["tasks"][task]["metrics"].get(metric) for column in columns]
    known = [score for score in scores if score]
    low, high = min(s["low"] for s in known), max(s["high"] for s in known)
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    changes: list[Comparison | None] = [None] * len(columns)
    for number in range(1, len(columns)):
        changes[number] = _change(task, metric, columns[number - 1], columns[number], seed)
    return Row(metric, metric in LOWER_IS_BETTER, scores, changes, low, high)


def _change(task: str, metric: str, before: Column, now: Column, seed: int) -> Comparison | None:
    """None if they did not answer the same questions, or the metric is no mean over items."""
    if before.results["tasks"][task]["data_hash"] != now.results["tasks"][task]["data_hash"]:
        return None
    ours, theirs = _values(now.items[task], metric), _values(before.items[task], metric)
    shared = ours.keys() & theirs.keys()
    if not any(ours[id][1] for id in shared) or not any(theirs[id][1] for id in shared):
        return None
    return compare(ours, theirs, margin=MARGIN, seed=seed)


def _values(items: Sequence[Judged], metric: str) -> dict[str, tuple[float, float]]:
    return {item.id: _pair(item.values[metric]) for item in items if metric in item.values}


def _pair(value: Value) -> tuple[float, float]:
    return (float(value), 1.0) if isinstance(value, int | float) else (value[0], value[1])


def _slices(kind: str, parts: Sequence[dict[str, Any]]) -> list[Slices]:
    """Of each slice with more than one value, the main metric (else the first that is there)."""
    found = []
    names = dict.fromkeys(name for part in parts for name in part["slices"])
    for name in names:
        groups = [part["slices"].get(name, {}) for part in parts]
        values = sorted({value for group in groups for value in group})
        if len(values) < 2:
            continue
        rows: dict[str, list[tuple[str, list[Score | None]]]] = {}
        for value in values:
            have = next(group[value] for group in groups if value in group)
            main = MAIN.get(kind)
            metric = main if main in have else next(iter(have), None)
            if metric is not None:
                scores = [group.get(value, {}).get(metric) for group in groups]
                rows.setdefault(metric, []).append((value, scores))
        found += [Slices(name, metric, part) for metric, part in rows.items()]
    return found


def _answers(
    task: str, kind: str, columns: Sequence[Column]
) -> tuple[list[Answers], list[Answers]]:
    """Best and worst answers of the last column; nothing that must not be shown has any."""
    ranked = []
    for item in columns[-1].items[task]:
        scores = [item.values[name] for name in RANKED_BY.get(kind, ()) if name in item.values]
        if scores and item.shown:
            pairs = [_pair(score) for score in scores]
            mean = sum(a / b if b else 0.0 for a, b in pairs) / len(pairs)
            ranked.append((mean, item.id))
    ranked.sort(key=lambda pair: (-pair[0], pair[1]))
    shown = {
        (column.name, item.id): item.shown
        for column in columns
        for item in column.items[task]
        if item.shown
    }
    answers = [
        Answers(
            score,
            [(c.name, shown[c.name, id]) for c in columns if (c.name, id) in shown],
        )
        for score, id in ranked
    ]
    half = min(SHOWN_ANSWERS, len(answers) // 2)
    return answers[: len(answers) - half][:SHOWN_ANSWERS], answers[::-1][:half]

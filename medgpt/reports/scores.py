"""Scores of one or more evaluations side by side, as the reports show them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from medgpt.eval.gates import MAIN, disagreement
from medgpt.eval.results import LENGTHS
from medgpt.eval.stats import Comparison, compare
from medgpt.eval.task import ItemResult, Value
from medgpt.eval.tasks.overlap import BLEU_METRICS, DISTINCT_METRICS, difference_of

MARGIN = 0.01  # of a share or of nats: differences whose interval lies within it count as none
BLEU_MARGIN = 1.0  # the same in percent
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


def margin_of(metric: str) -> float:
    """The difference that counts as none."""
    if metric in LENGTHS:
        return 0.0
    return BLEU_MARGIN if metric in BLEU_METRICS else MARGIN


@dataclass(frozen=True)
class Column:
    """One evaluation."""

    name: str
    results: dict[str, Any]
    items: dict[str, list[ItemResult]]  # by task


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
    facts = [_facts(column.name, part) for column, part in zip(columns, parts, strict=True)]
    for (before, theirs), (now, ours) in pairwise(zip(columns, parts, strict=True)):
        if reason := disagreement(ours, theirs):
            facts.append(f"{now.name} is not compared with {before.name}, which {reason}")
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


def _facts(name: str, part: dict[str, Any]) -> str:
    template = part.get("chat_template")
    chat = f", chat template {template[:8]}" if template else ""
    return (
        f"{name}: n={part['n']}, data {part['data_hash']}, prompt {part['template']}{chat}, "
        f"read by {part.get('rules', 'older rules')}, seed {part['seed']}"
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
    """None if the two do not compare, or one of them has no such metric."""
    if disagreement(now.results["tasks"][task], before.results["tasks"][task]):
        return None
    if metric in (*BLEU_METRICS, *DISTINCT_METRICS):
        return _corpus_change(task, metric, before, now, seed)
    ours, theirs = _values(now.items[task], metric), _values(before.items[task], metric)
    shared = ours.keys() & theirs.keys()
    if not any(ours[id][1] for id in shared) or not any(theirs[id][1] for id in shared):
        return None
    return compare(ours, theirs, margin=margin_of(metric), seed=seed)


def _corpus_change(
    task: str, metric: str, before: Column, now: Column, seed: int
) -> Comparison | None:
    """Of a score of all answers together."""
    scores = [column.results["tasks"][task]["metrics"].get(metric) for column in (now, before)]
    if None in scores:
        return None
    one, other = (score["value"] for score in scores)
    ours, theirs = ({i.id: i.counts for i in column.items[task]} for column in (now, before))
    assert ours.keys() == theirs.keys(), f"{task}: equal data have other items"
    found = difference_of(metric, list(ours.values()), [theirs[id] for id in ours], seed)
    return Comparison(len(ours), one, other, found, None, margin_of(metric))


def _values(items: Sequence[ItemResult], metric: str) -> dict[str, tuple[float, float]]:
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

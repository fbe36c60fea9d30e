"""Evaluate a reward model on held-out pairs of answers: reward.json of a run."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from medgpt.data.loader.packed_row import PackedRow
from medgpt.data.tokenized.shards import read_index
from medgpt.runs import Run

REWARD_EVAL_FILE = "reward.json"
MAX_HELD_OUT_PROMPTS = 2048
HISTOGRAM_BINS = 24  # of the margins
LENGTH_BOUNDS = (-1.0, -0.5, -0.1, 0.1, 0.5, 1.0)  # of groups by length difference


class ScoredPair(NamedTuple):
    """A better and a worse answer to a held-out prompt."""

    sample_id: str
    margin: float  # score of the better answer minus that of the worse
    length_gap: float  # tokens, better minus worse, divided by the longer: -1..1


def scored_pairs(row: PackedRow, scores: Tensor) -> list[ScoredPair]:
    """Return the pairs of a prompt with unequal grades; `scores` (K,) are normalized."""
    assert row.sequence_lengths is not None
    assert row.grades is not None
    prompt_length = int(row.targets.argmax())  # every sequence begins with the prompt
    lengths, grades = (row.sequence_lengths - prompt_length).tolist(), row.grades.tolist()
    pairs = []
    for first, second in combinations(range(len(grades)), 2):
        if grades[first] == grades[second]:
            continue
        better, worse = (first, second) if grades[first] > grades[second] else (second, first)
        gap = (lengths[better] - lengths[worse]) / max(lengths[better], lengths[worse])
        margin = float(scores[better] - scores[worse])
        pairs.append(ScoredPair(row.sample_ids[0], margin, gap))
    return pairs


def held_out_source_names(run: Run) -> dict[str, str]:
    """Return the name of the source of each held-out sample, by sample id."""
    index = read_index(run.data, "validation")
    names = [source["name"] for source in run.config["data"]["sources"]]
    return {
        sample_id.decode(): names[source]
        for sample_id, source in zip(index.sample_id.tolist(), index.source.tolist(), strict=True)
    }


def evaluate_pairs(pairs: Sequence[ScoredPair], source_of: Mapping[str, str]) -> dict[str, Any]:
    """Return the accuracy of all pairs, by source and by length, and a histogram of margins."""
    margins = [pair.margin for pair in pairs]
    counts, edges = np.histogram(margins, HISTOGRAM_BINS) if margins else (np.zeros(0), np.zeros(0))
    by_length = []
    for low, high in pairwise(LENGTH_BOUNDS):
        group = [p for p in pairs if low <= p.length_gap < high or p.length_gap == high == 1]
        by_length.append({"name": f"{low:+.0%} to {high:+.0%}", **_pair_accuracy(group)})
    return {
        **_pair_accuracy(pairs),
        "samples": len({pair.sample_id for pair in pairs}),
        "by_source": [
            {"name": name, **_pair_accuracy(p for p in pairs if source_of[p.sample_id] == name)}
            for name in dict.fromkeys(source_of.values())
        ],
        "by_length": by_length,
        "leads": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def _pair_accuracy(pairs: Iterable[ScoredPair]) -> dict[str, Any]:
    """Return number, accuracy and mean margin of the pairs; None without pairs."""
    margins = np.array([pair.margin for pair in pairs])
    if not len(margins):
        return {"pairs": 0, "accuracy": None, "mean_lead": None}
    return {
        "pairs": len(margins),
        "accuracy": float((margins > 0).mean()),
        "mean_lead": float(margins.mean()),
    }

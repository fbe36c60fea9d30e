"""How well a reward model tells held-out answers apart, and by what: reward.json of a run."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from medgpt.data.loader.packed_row import Row
from medgpt.data.tokenized.shards import read_index
from medgpt.runs import Run

FINDINGS = "reward.json"
HELD_OUT_PROMPTS = 2048  # at most
BINS = 24  # of the histogram of leads
LENGTHS = (-1.0, -0.5, -0.1, 0.1, 0.5, 1.0)  # bounds of how much longer the better answer is


class Compared(NamedTuple):
    """A pair of answers to a held-out prompt."""

    sample_id: str
    lead: float  # score of the better answer less that of the worse
    longer: float  # of the better answer: difference of the tokens over those of the longer, -1..1


def compared(row: Row, scores: Tensor) -> list[Compared]:
    """The pairs of a prompt of which one answer is better; scores (K,) are normalised."""
    assert row.pieces is not None
    assert row.grades is not None
    start = int(row.targets.argmax())  # every piece begins with the prompt
    lengths, grades = (row.pieces - start).tolist(), row.grades.tolist()
    found = []
    for one, other in combinations(range(len(grades)), 2):
        if grades[one] == grades[other]:
            continue
        up, down = (one, other) if grades[one] > grades[other] else (other, one)
        longer = (lengths[up] - lengths[down]) / max(lengths[up], lengths[down])
        found.append(Compared(row.sample_ids[0], float(scores[up] - scores[down]), longer))
    return found


def held_out_sources(run: Run) -> dict[str, str]:
    """The name of the source of each held-out sample."""
    index = read_index(run.data, "validation")
    names = [source["name"] for source in run.config["data"]["sources"]]
    return {
        sample_id.decode(): names[source]
        for sample_id, source in zip(index.sample_id.tolist(), index.source.tolist(), strict=True)
    }


def findings(pairs: Sequence[Compared], source_of: Mapping[str, str]) -> dict[str, Any]:
    """Accuracy of all pairs, by source and by length, and the leads' histogram."""
    leads = [pair.lead for pair in pairs]
    counts, edges = np.histogram(leads, BINS) if leads else (np.zeros(0), np.zeros(0))
    return {
        **_accuracy(pairs),
        "samples": len({pair.sample_id for pair in pairs}),
        "by_source": [
            {"name": name, **_accuracy(p for p in pairs if source_of[p.sample_id] == name)}
            for name in dict.fromkeys(source_of.values())
        ],
        "by_length": [
            {
                "name": f"{low:+.0%} to {high:+.0%}",
                **_accuracy(p for p in pairs if low <= p.longer < high or p.longer == high == 1),
            }
            for low, high in pairwise(LENGTHS)
        ],
        "leads": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def _accuracy(pairs: Iterable[Compared]) -> dict[str, Any]:
    """Share of pairs in the right order, null without pairs."""
    leads = np.array([pair.lead for pair in pairs])
    if not len(leads):
        return {"pairs": 0, "accuracy": None, "mean_lead": None}
    return {
        "pairs": len(leads),
        "accuracy": float((leads > 0).mean()),
        "mean_lead": float(leads.mean()),
    }

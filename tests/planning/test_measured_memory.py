"""Predicted memory of a worker against that of real training ranks."""

from dataclasses import replace

import pytest

from medgpt.planning.memory import allocated_phases
from tests.bench.plan_memory import SIZES, Case, compare, predicted, run_ranks

SMALL = Case(hidden=512, layers=8, vocab=8000, zero_stage=2, tokens=32, snapshot=False)


def test_predicted_memory_matches_what_torch_allocates() -> None:
    expected = max(phase.total_bytes for phase in allocated_phases(*predicted(SMALL)))
    measured = max(rank["live"] for rank in run_ranks(SMALL, "live"))
    assert expected == pytest.approx(measured, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", range(4))
def test_predicted_memory_is_within_15_percent_of_a_real_run(zero_stage: int) -> None:
    hidden, layers, vocab = SIZES["100M"]
    case = Case(hidden=hidden, layers=layers, vocab=vocab, zero_stage=zero_stage, tokens=256)
    rows = compare(case)
    assert [what for what, _, _ in rows] == ["training", "saving"]
    for what, expected, measured in rows:
        assert expected == pytest.approx(measured, rel=0.15), what


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_checkpointing_in_bf16_is_predicted_too(zero_stage: int) -> None:
    case = replace(SMALL, zero_stage=zero_stage, precision="bf16", tokens=16, checkpointing=True)
    expected = max(phase.total_bytes for phase in allocated_phases(*predicted(case)))
    measured = max(rank["live"] for rank in run_ranks(case, "live"))
    assert expected == pytest.approx(measured, rel=0.15)

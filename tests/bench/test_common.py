"""The arithmetic of the benchmarks and their measurement of a contender."""

import json
import sys
from pathlib import Path

import pytest

from tests.bench import common

CONTENDER = """
import json, sys, time
with open(sys.argv[1], "a") as file:
    for step in range(1, 5):
        time.sleep(0.5)
        line = {"step": step, "time_s": step * 0.5, "train/tokens": 10 * step}
        file.write(json.dumps(line) + "\\n")
        file.flush()
sys.exit(int(sys.argv[2]))
"""


def test_a_spread_is_the_median_between_the_extremes() -> None:
    assert common.spread([3.0, 1.0, 2.0]) == "2.00 (1.00-3.00, 3 rounds)"


def test_ratios_pair_the_rounds() -> None:
    assert common.ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]


def test_a_window_counts_what_lies_between_its_steps(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    command = [sys.executable, "-c", CONTENDER, str(metrics), "0"]
    window = common.measure(command, metrics, first=1, last=3)
    assert (window.tokens, window.wall_s) == (50, 1.0)
    assert window.tokens_per_s == 50


def test_a_failed_contender_raises(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    with pytest.raises(RuntimeError):
        common.measure(
            [sys.executable, "-c", CONTENDER, str(metrics), "3"], metrics, first=1, last=3
        )


def test_flops_of_a_model_of_one_layer() -> None:
    size = common.Size(hidden=4, layers=1, vocab=10)  # feed-forward width 11
    block = 4 * 4 * 4 + 3 * 4 * 11
    assert size.flops(tokens=2, targets=1) == 6 * (2 * block + 40)


def test_rows_take_as_many_of_each_file(tmp_path: Path) -> None:
    shapes = (
        {"instruction": "q", "output": "a"},
        {"department": "d", "title": "t", "ask": "", "answer": "a"},
    )
    files = []
    for number, shape in enumerate(shapes):
        files.append(tmp_path / f"{number}.jsonl")
        files[-1].write_text((json.dumps(shape) + "\n") * 5, "utf-8")
    rows = common.rows(files, 4)
    assert [row["question"] for row in rows] == ["q", "q", "t", "t"]

import pytest

from medgpt.config.train import OptimizerConfig
from medgpt.engine.schedule import learning_rate


def learning_rates(steps: range, total_steps: int, **values: float | str) -> list[float]:
    config = OptimizerConfig.model_validate({"learning_rate": 8.0, **values})
    return [learning_rate(step, total_steps, config) for step in steps]


def test_warm_up_rises_linearly_from_the_first_step_and_peaks_after_its_share() -> None:
    # 3 of 12 steps: 1/4, 2/4, 3/4 of the peak, then the peak
    found = learning_rates(range(5), 12, schedule="constant", warmup_share=0.25)
    assert found == pytest.approx([2, 4, 6, 8, 8])


def test_no_warm_up_starts_at_the_peak() -> None:
    for schedule in ("cosine", "linear", "wsd", "constant"):
        assert learning_rates(range(1), 10, schedule=schedule, warmup_share=0) == pytest.approx([8])


def test_cosine_halves_its_range_half_way_and_ends_at_the_floor() -> None:
    # floor 2: 2 + 6 * (1 + cos(pi * k / 4)) / 2
    found = learning_rates(range(6), 4, schedule="cosine", warmup_share=0, min_lr_ratio=0.25)
    assert found == pytest.approx([8, 2 + 3 * 1.70710678, 5, 2 + 3 * 0.29289322, 2, 2])


def test_linear_falls_in_a_straight_line_after_warm_up() -> None:
    found = learning_rates(range(7), 5, schedule="linear", warmup_share=0.2, min_lr_ratio=0)
    assert found == pytest.approx([4, 8, 6, 4, 2, 0, 0])


def test_wsd_stays_at_the_peak_then_falls_linearly() -> None:
    # 1 warm-up step, decay over the last 4 of 10
    found = learning_rates(
        range(11), 10, schedule="wsd", warmup_share=0.1, decay_share=0.4, min_lr_ratio=0.5
    )
    assert found == pytest.approx([4, 8, 8, 8, 8, 8, 8, 7, 6, 5, 4])


def test_wsd_without_decay_is_constant() -> None:
    found = learning_rates(range(4), 4, schedule="wsd", warmup_share=0, decay_share=0)
    assert found == pytest.approx([8] * 4)


def test_a_decay_that_would_start_in_the_warm_up_starts_after_it() -> None:
    found = learning_rates(
        range(4), 4, schedule="wsd", warmup_share=0.5, decay_share=1, min_lr_ratio=0
    )
    assert found == pytest.approx([8 / 3, 16 / 3, 8, 4])


def test_a_single_step_learns_at_the_peak() -> None:
    assert learning_rates(range(1), 1, schedule="cosine", warmup_share=0.03) == pytest.approx([8])

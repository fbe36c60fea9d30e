"""FLOPs and speeds against hand-computed numbers, and which bound is active."""

from dataclasses import replace

import pytest

from medgpt.planning.hardware import Device
from medgpt.planning.speed import compute_speed, decode_speed, forward_flops, train_flops
from tests.planning.toy_models import toy_model

DEVICE = Device(memory_gb=10, tflops=1, memory_gb_per_s=100, link_gb_per_s=1, source="made up")
MODEL = toy_model()
PRODUCTS = 4 * 10_000_000 + 1000 * 100  # the matrices, and the tied output layer


def test_a_token_costs_two_operations_a_parameter_and_its_share_of_attention() -> None:
    attention = 4 * 4 * 100 * 50  # layers, numbers of all heads, half of a hundred tokens
    assert forward_flops(MODEL, 100) == 2 * PRODUCTS + attention
    assert forward_flops(replace(MODEL, is_causal=False), 100) == 2 * PRODUCTS + 2 * attention


def test_training_takes_three_forward_passes_and_four_with_checkpointing() -> None:
    forward = forward_flops(MODEL, 100)
    assert train_flops(MODEL, 100, checkpointing=False) == 3 * forward
    assert train_flops(MODEL, 100, checkpointing=True) == 4 * forward
    frozen = toy_model(frozen=3)
    assert train_flops(frozen, 100, checkpointing=False) == 2 * forward_flops(frozen, 100)


def test_speed_is_the_peak_over_the_operations_and_the_assumed_share_of_it() -> None:
    assert compute_speed(1e9, DEVICE, devices=0.5, mfu=1) == 500
    assert compute_speed(1e9, DEVICE, devices=0.5, mfu=0.4) == 200


def decode(rows: int, *, response: int = 100, mfu: float = 1.0) -> float:
    return decode_speed(
        MODEL, DEVICE, devices=1, rows=rows, prompt=0, response=response, b=2, mfu=mfu
    )


def test_few_rows_are_bound_by_reading_the_weights() -> None:
    cache = 50 * 4 * 2 * 2 * 25 * 2
    assert decode(1) == pytest.approx(100e9 / (2 * MODEL.num_params + cache))
    assert decode(1, mfu=0.5) == decode(1)


def test_many_rows_are_bound_by_their_products() -> None:
    assert decode(10_000) == pytest.approx(1e12 / forward_flops(MODEL, 100))
    assert decode(10_000, mfu=0.5) == pytest.approx(decode(10_000) / 2)

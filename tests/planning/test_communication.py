"""Collectives of a step, the bytes that a ring sends, and their time."""

from dataclasses import replace

import pytest

from medgpt.models.model_shapes import WeightShape
from medgpt.planning.communication import (
    Collectives,
    LinkSpeeds,
    communication_seconds,
    num_buckets,
    num_prefetches,
    regathered_elements,
    step_collectives,
)
from tests.planning.toy_models import toy_model

MODEL = toy_model()
P = 40_100_000


def test_a_ring_sends_everything_but_the_own_part_in_each_round() -> None:
    assert Collectives("all_reduce", 100, 1).bytes_sent_per_rank(4) == 2 * 100 * 3 / 4
    assert (
        Collectives("all_gather", 100, 1).bytes_sent_per_rank(4)
        == Collectives("reduce_scatter", 100, 1).bytes_sent_per_rank(4)
        == 75
    )


def bytes_of(zero_stage: int, micro_batches: int, b: int = 2) -> dict[str, float]:
    collectives = step_collectives(
        MODEL, zero_stage=zero_stage, num_ranks=4, micro_batches=micro_batches, b=b
    )
    return {collective.kind: collective.num_bytes for collective in collectives}


def test_gradients_travel_in_fp32_once_a_step_or_in_every_micro_batch() -> None:
    assert bytes_of(0, 3) == {"all_reduce": 4 * P}
    assert bytes_of(1, 3) == {"all_reduce": 4 * P, "all_gather": 2 * P}
    assert bytes_of(2, 3) == {"all_reduce": 3 * 4 * P, "all_gather": 2 * P}
    whole_on_every_rank = MODEL.num_embedding  # at 100,000 elements
    assert bytes_of(3, 3) == {
        "reduce_scatter": 3 * 4 * P,
        "all_gather": 2 * (3 * (P - whole_on_every_rank) + whole_on_every_rank),
    }


def test_a_single_rank_sends_nothing() -> None:
    assert step_collectives(MODEL, zero_stage=3, num_ranks=1, micro_batches=2, b=2) == []


def test_weights_are_gathered_again_where_their_uses_lie_far_apart() -> None:
    assert regathered_elements(400_000_000) == 0
    assert regathered_elements(3_000_000_000) == 2_500_000_000


@pytest.mark.parametrize(
    ("sizes", "calls"),
    [([], 0), ([10], 1), ([50_000_000], 1), ([30_000_000, 30_000_000], 2),
     ([20_000_000, 30_000_000, 1], 2), ([1, 500_000_000, 1], 3)],
)  # fmt: skip
def test_a_bucket_is_reduced_before_it_would_overflow(sizes: list[int], calls: int) -> None:
    assert num_buckets(sizes) == calls


def test_weights_are_gathered_ahead_in_groups_and_small_ones_once_a_step() -> None:
    assert num_prefetches([30_000_000, 30_000_000, 1]) == 2
    small = WeightShape(10, is_matrix=False, trainable=True)
    model = replace(MODEL, weights=(*MODEL.weights, small, small))
    [scattered, gathered] = step_collectives(model, zero_stage=3, num_ranks=2, micro_batches=3, b=2)
    assert scattered.num_bytes == 3 * 4 * (P + 20)
    assert gathered.num_bytes == 2 * (3 * 40_000_000 + 100_000 + 20)
    assert gathered.num_calls == 3 + 3  # the embedding is small, too


def test_the_slower_link_of_a_ring_through_nodes_decides() -> None:
    collectives = [Collectives("all_gather", 8e9, 1)]
    links = LinkSpeeds(
        ranks_per_node=4, intra_node_gb_per_s=100, network_gb_per_s=10, hop_latency_us=0
    )
    assert communication_seconds(collectives, 4, links) == pytest.approx(6e9 / 100e9)
    assert communication_seconds(collectives, 8, links) == pytest.approx(7e9 / 10e9)


def test_every_hop_adds_its_latency() -> None:
    collectives = [Collectives("all_reduce", 0, 3), Collectives("all_gather", 0, 1)]
    links = LinkSpeeds(
        ranks_per_node=4, intra_node_gb_per_s=1, network_gb_per_s=1, hop_latency_us=5
    )
    assert communication_seconds(collectives, 5, links) == pytest.approx((3 * 2 + 1) * 4 * 5e-6)

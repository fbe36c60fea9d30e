"""Collectives that the ranks of a pool run in an optimizer step: calls, bytes and seconds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from medgpt.config.train import BUCKET_ELEMENTS
from medgpt.models.model_shapes import ModelShape
from medgpt.planning.memory import FP32, ZERO3_LIVE_ELEMENTS, ZERO3_PREFETCH_ELEMENTS

CollectiveKind = Literal["all_reduce", "reduce_scatter", "all_gather"]
RING_PASSES: dict[CollectiveKind, int] = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}
ZERO3_PERSISTENT_ELEMENTS = 100_000
"""Largest weight in elements that ZeRO-3 keeps whole on every rank; DeepSpeed's default."""


@dataclass(frozen=True, slots=True)
class Collectives:
    """All collectives of one kind in an optimizer step."""

    kind: CollectiveKind
    num_bytes: float
    """Total size of the tensors that are reduced, or of the gathered result."""
    num_calls: int

    def bytes_sent_per_rank(self, num_ranks: int) -> float:
        """Return the bytes that each rank sends on a ring: per pass, all but its own part.

        Thakur et al., 2005, "Optimization of Collective Communication Operations in MPICH".
        """
        return RING_PASSES[self.kind] * self.num_bytes * (num_ranks - 1) / num_ranks


def step_collectives(
    model: ModelShape, *, zero_stage: int, num_ranks: int, micro_batches: int, b: int
) -> list[Collectives]:
    """Return the collectives of one optimizer step.

    Gradients are communicated in fp32: once per step at stages 0 and 1, in every micro-batch at 2
    and 3. At stage 2 DeepSpeed all-reduces them (twice the bytes of arXiv 1910.02054, section 7.1,
    which reduces each to its owner). Weights are gathered in their own dtype, b bytes each: once
    per step at stages 1 and 2, in every micro-batch at stage 3, and again for the backward pass if
    the model is too large to stay whole (section 7.2); small weights, which stay whole, once per
    step.
    """
    if num_ranks == 1:
        return []
    trained = [weight.num_elements for weight in model.weights if weight.trainable]
    gradients = FP32 * sum(trained)
    groups = len({weight.is_matrix for weight in model.weights if weight.trainable})
    if zero_stage == 0:
        return [Collectives("all_reduce", gradients, 1)]
    num_bucket_calls = num_buckets(trained)
    if zero_stage < 3:
        num_gathers = 1 if zero_stage == 1 else micro_batches
        return [
            Collectives("all_reduce", gradients * num_gathers, num_bucket_calls * num_gathers),
            Collectives("all_gather", b * sum(trained), groups),
        ]
    sizes = [weight.num_elements for weight in model.weights]
    partitioned = [size for size in sizes if size > ZERO3_PERSISTENT_ELEMENTS]
    persistent = [size for size in trained if size <= ZERO3_PERSISTENT_ELEMENTS]
    num_gathers = micro_batches * (1 + regathered_elements(sum(partitioned)) / sum(partitioned))
    return [
        Collectives("reduce_scatter", gradients * micro_batches, num_bucket_calls * micro_batches),
        Collectives(
            "all_gather",
            b * (sum(partitioned) * num_gathers + sum(persistent)),
            round(num_prefetches(partitioned) * num_gathers) + len(persistent),
        ),
    ]


def regathered_elements(partitioned: int) -> int:
    """Return the elements that ZeRO-3 gathers again for the backward pass: those whose two uses are
    further apart than ZERO3_LIVE_ELEMENTS. The backward pass starts with the last ones used."""
    return max(0, partitioned - ZERO3_LIVE_ELEMENTS // 2)


def num_buckets(sizes: Sequence[int]) -> int:
    """Return the number of calls that reduce gradients of these sizes in buckets."""
    calls, filled = 0, 0
    for size in sizes:
        if filled and filled + size > BUCKET_ELEMENTS:
            calls, filled = calls + 1, 0
        filled += size
    return calls + (filled > 0)


def num_prefetches(sizes: Sequence[int]) -> int:
    """Return the smallest number of calls that gather weights of these sizes ahead: each call takes
    weights until they have ZERO3_PREFETCH_ELEMENTS or more."""
    calls, filled = 0, 0
    for size in sizes:
        filled += size
        if filled >= ZERO3_PREFETCH_ELEMENTS:
            calls, filled = calls + 1, 0
    return calls + (filled > 0)


@dataclass(frozen=True, kw_only=True)
class LinkSpeeds:
    """Links between the ranks of a pool."""

    ranks_per_node: int
    intra_node_gb_per_s: float
    """1e9 bytes/s from a device to another device of its node."""
    network_gb_per_s: float
    """1e9 bytes/s from a node to other nodes, for all its devices together."""
    hop_latency_us: float = 5.0
    """Latency from one rank to the next in microseconds. Assumed, not measured."""


def communication_seconds(
    collectives: Sequence[Collectives], num_ranks: int, links: LinkSpeeds
) -> float:
    """Return the time of the collectives on a ring through all nodes, in seconds.

    A rank sends over its own link. A node sends once over its network, whatever its number of
    ranks, because all neighbors on the ring but one pair are on the same node.
    """
    num_bytes = sum(c.bytes_sent_per_rank(num_ranks) for c in collectives)
    num_passes = sum(c.num_calls * RING_PASSES[c.kind] for c in collectives)
    slowest_gb_per_s = links.intra_node_gb_per_s
    if num_ranks > links.ranks_per_node:
        slowest_gb_per_s = min(slowest_gb_per_s, links.network_gb_per_s)
    latency_s = num_passes * (num_ranks - 1) * links.hop_latency_us * 1e-6
    return num_bytes / (slowest_gb_per_s * 1e9) + latency_s

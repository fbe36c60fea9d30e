"""What the ranks of a pool send each other in an optimizer step: messages, bytes, and how long."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from medgpt.config.train import BUCKET_ELEMENTS
from medgpt.models.model_shapes import ModelShape
from medgpt.planning.memory import FP32, ZERO3_LIVE_ELEMENTS, ZERO3_PREFETCH_ELEMENTS

CollectiveKind = Literal["all_reduce", "reduce_scatter", "all_gather"]
RING_PASSES: dict[CollectiveKind, int] = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}
ZERO3_PERSISTENT_ELEMENTS = 100_000
"""Elements up to which ZeRO-3 keeps a weight whole on every rank; DeepSpeed's default."""


@dataclass(frozen=True, slots=True)
class Collectives:
    """All collectives of a kind in a step."""

    kind: CollectiveKind
    num_bytes: float
    """Of what is reduced, or of what all ranks have together after a gather."""
    num_calls: int

    def bytes_sent_per_rank(self, num_ranks: int) -> float:
        """Bytes that each rank sends on a ring: of each of its rounds, all but its own part.

        Thakur et al., 2005, "Optimization of Collective Communication Operations in MPICH".
        """
        return RING_PASSES[self.kind] * self.num_bytes * (num_ranks - 1) / num_ranks


def step_collectives(
    model: ModelShape, *, zero_stage: int, num_ranks: int, micro_batches: int, b: int
) -> list[Collectives]:
    """The collectives of one optimizer step.

    Gradients travel in fp32: at stages 0 and 1 once a step, at 2 and 3 in every micro-batch. At
    stage 2 DeepSpeed all-reduces them (twice the bytes of arXiv 1910.02054, section 7.1, which
    reduces each to its owner). Weights are gathered in their own dtype, b bytes a number: at stages
    1 and 2 once a step, at 3 in every micro-batch, again for the backward pass where the model is
    too large to stay whole (section 7.2); the small ones that every rank keeps, once a step.
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
    partitioned = [
        weight.num_elements
        for weight in model.weights
        if weight.num_elements > ZERO3_PERSISTENT_ELEMENTS
    ]
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
    """Elements that ZeRO-3 gathers for the backward pass: those whose two uses lie further apart
    than LIVE_PARAMETERS. The last of the forward pass are the first of the backward pass."""
    return max(0, partitioned - ZERO3_LIVE_ELEMENTS // 2)


def num_buckets(sizes: Sequence[int]) -> int:
    """Calls that reduce gradients of these sizes: a bucket is reduced before it would overflow."""
    calls, filled = 0, 0
    for size in sizes:
        if filled and filled + size > BUCKET_ELEMENTS:
            calls, filled = calls + 1, 0
        filled += size
    return calls + (filled > 0)


def num_prefetches(sizes: Sequence[int]) -> int:
    """Calls that gather weights of these sizes ahead, as few as there can be: each takes weights
    until they are PREFETCHED elements or more."""
    calls, filled = 0, 0
    for size in sizes:
        filled += size
        if filled >= ZERO3_PREFETCH_ELEMENTS:
            calls, filled = calls + 1, 0
    return calls + (filled > 0)


@dataclass(frozen=True, kw_only=True)
class LinkSpeeds:
    """Between the ranks of a pool."""

    ranks_per_node: int
    intra_node_gb_per_s: float
    """1e9 bytes/s that a device sends to another one of its node."""
    network_gb_per_s: float
    """1e9 bytes/s that a node sends to other nodes, all its devices together."""
    hop_latency_us: float = 5.0
    """Microseconds from one rank to the next, beside the bytes. An assumption."""


def communication_seconds(
    collectives: Sequence[Collectives], num_ranks: int, links: LinkSpeeds
) -> float:
    """How long the messages take on a ring through all nodes.

    What a rank sends passes its own link, and once a node its network, whatever the number of its
    ranks: neighbours on the ring are in the same node but for one pair.
    """
    num_bytes = sum(collective.bytes_sent_per_rank(num_ranks) for collective in collectives)
    calls = sum(collective.num_calls * RING_PASSES[collective.kind] for collective in collectives)
    spans_nodes = num_ranks > links.ranks_per_node
    slowest_gb_per_s = (
        min(links.intra_node_gb_per_s, links.network_gb_per_s)
        if spans_nodes
        else links.intra_node_gb_per_s
    )
    return (
        num_bytes / (slowest_gb_per_s * 1e9) + calls * (num_ranks - 1) * links.hop_latency_us * 1e-6
    )

"""What the ranks of a pool send each other in an optimizer step: messages, bytes, and how long."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from medgpt.config.train import BUCKET_ELEMENTS
from medgpt.models.model_shapes import Outline
from medgpt.planning.memory import FP32, LIVE_PARAMETERS, PREFETCHED

Kind = Literal["all_reduce", "reduce_scatter", "all_gather"]
ROUNDS: dict[Kind, int] = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}
PERSISTENT = 100_000
"""Elements up to which ZeRO-3 keeps a weight whole on every rank; DeepSpeed's default."""


@dataclass(frozen=True, slots=True)
class Message:
    """All collectives of a kind in a step."""

    kind: Kind
    num_bytes: float
    """Of what is reduced, or of what all ranks have together after a gather."""
    calls: int

    def sent(self, num_ranks: int) -> float:
        """Bytes that each rank sends on a ring: of each of its rounds, all but its own part.

        Thakur et al., 2005, "Optimization of Collective Communication Operations in MPICH".
        """
        return ROUNDS[self.kind] * self.num_bytes * (num_ranks - 1) / num_ranks


def messages(
    model: Outline, *, zero_stage: int, num_ranks: int, micro_batches: int, b: int
) -> list[Message]:
    """The collectives of one optimizer step.

    Gradients travel in fp32: at stages 0 and 1 once a step, at 2 and 3 in every micro-batch. At
    stage 2 DeepSpeed all-reduces them (twice the bytes of arXiv 1910.02054, section 7.1, which
    reduces each to its owner). Weights are gathered in their own dtype, b bytes a number: at stages
    1 and 2 once a step, at 3 in every micro-batch, again for the backward pass where the model is
    too large to stay whole (section 7.2); the small ones that every rank keeps once a step.
    """
    if num_ranks == 1:
        return []
    trained = [weight.numel for weight in model.weights if weight.trainable]
    gradients = FP32 * sum(trained)
    groups = len({weight.is_matrix for weight in model.weights if weight.trainable})
    if zero_stage == 0:
        return [Message("all_reduce", gradients, 1)]
    calls = num_buckets(trained)
    if zero_stage < 3:
        times = 1 if zero_stage == 1 else micro_batches
        return [
            Message("all_reduce", gradients * times, calls * times),
            Message("all_gather", b * sum(trained), groups),
        ]
    large = [weight.numel for weight in model.weights if weight.numel > PERSISTENT]
    small = [size for size in trained if size <= PERSISTENT]
    times = micro_batches * (1 + gathered_again(sum(large)) / sum(large))
    return [
        Message("reduce_scatter", gradients * micro_batches, calls * micro_batches),
        Message(
            "all_gather",
            b * (sum(large) * times + sum(small)),
            round(num_prefetches(large) * times) + len(small),
        ),
    ]


def gathered_again(partitioned: int) -> int:
    """Elements that ZeRO-3 gathers for the backward pass: those whose two uses lie further apart
    than LIVE_PARAMETERS. The last of the forward pass are the first of the backward pass."""
    return max(0, partitioned - LIVE_PARAMETERS // 2)


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
        if filled >= PREFETCHED:
            calls, filled = calls + 1, 0
    return calls + (filled > 0)


@dataclass(frozen=True, kw_only=True)
class Links:
    """Between the ranks of a pool."""

    ranks_per_node: int
    inside_gb_per_s: float
    """1e9 bytes/s that a device sends to another one of its node."""
    network_gb_per_s: float
    """1e9 bytes/s that a node sends to other nodes, all its devices together."""
    hop_us: float = 5.0
    """Microseconds from one rank to the next, beside the bytes. An assumption."""


def seconds(found: Sequence[Message], num_ranks: int, links: Links) -> float:
    """How long the messages take on a ring through all nodes.

    What a rank sends passes its own link, and once a node its network, whatever the number of its
    ranks: neighbours on the ring are in the same node but for one pair.
    """
    sent = sum(message.sent(num_ranks) for message in found)
    calls = sum(message.calls * ROUNDS[message.kind] for message in found)
    several = num_ranks > links.ranks_per_node
    slowest = (
        min(links.inside_gb_per_s, links.network_gb_per_s) if several else links.inside_gb_per_s
    )
    return sent / (slowest * 1e9) + calls * (num_ranks - 1) * links.hop_us * 1e-6

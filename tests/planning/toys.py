"""Models and settings of round numbers."""

from medgpt.models.model_shapes import Outline, Weight
from medgpt.planning.activations import Batch
from medgpt.planning.memory import Training

SMALL = Batch(tokens=16, labels=16, chunk=8192, checkpointing=False)


def toy(
    matrices: int = 4, size: int = 10_000_000, *, vocab: int = 1000, frozen: int = 0
) -> Outline:
    """An embedding of `vocab` x 100, tied, and matrices of `size`; the first `frozen` frozen."""
    blocks = [Weight(size, is_matrix=True, trainable=i >= frozen) for i in range(matrices)]
    embedding = Weight(vocab * 100, is_matrix=False, trainable=not frozen)
    return Outline(
        weights=(embedding, *blocks),
        embedding=vocab * 100,
        hidden=100,
        num_layers=matrices,
        num_heads=4,
        num_kv_heads=2,
        head_size=25,
        feed_forward=300,
        gated=True,
        vocab=vocab,
        tied=True,
    )


def setting(zero_stage: int, num_ranks: int, **changes) -> Training:
    values = {"b": 2, "batch": SMALL, "offload": False, "on_gpu": True, "snapshot": False}
    return Training(zero_stage=zero_stage, num_ranks=num_ranks, **{**values, **changes})

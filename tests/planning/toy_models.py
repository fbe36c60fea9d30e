"""Model shapes and engine settings with round numbers."""

from medgpt.models.model_shapes import ModelShape, WeightShape
from medgpt.planning.activations import MicroBatch
from medgpt.planning.memory import TrainingSetup

SMALL_BATCH = MicroBatch(
    num_tokens=16, num_labels=16, loss_chunk_tokens=8192, activation_checkpointing=False
)


def toy_model(
    matrices: int = 4, size: int = 10_000_000, *, vocab: int = 1000, frozen: int = 0
) -> ModelShape:
    """Return a tied embedding of `vocab` x 100 and matrices of `size`, the first `frozen`
    frozen."""
    blocks = [WeightShape(size, is_matrix=True, trainable=i >= frozen) for i in range(matrices)]
    embedding = WeightShape(vocab * 100, is_matrix=False, trainable=not frozen)
    return ModelShape(
        weights=(embedding, *blocks),
        num_embedding=vocab * 100,
        hidden_size=100,
        num_layers=matrices,
        num_heads=4,
        num_kv_heads=2,
        head_dim=25,
        intermediate_size=300,
        has_gated_mlp=True,
        vocab_size=vocab,
        has_tied_embeddings=True,
    )


def training_setup(zero_stage: int, num_ranks: int, **changes) -> TrainingSetup:
    values = {
        "bytes_per_weight": 2,
        "micro_batch": SMALL_BATCH,
        "offload_optimizer": False,
        "on_gpu": True,
        "is_saving_checkpoint": False,
    }
    return TrainingSetup(zero_stage=zero_stage, num_ranks=num_ranks, **{**values, **changes})

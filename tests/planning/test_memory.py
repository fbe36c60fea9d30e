"""Memory against hand-computed numbers, and relations between settings."""

import pytest

from medgpt.planning import activations
from medgpt.planning.memory import (
    CPU_RUNTIME_BYTES,
    CUDA_CONTEXT_BYTES,
    ZERO3_LIVE_ELEMENTS,
    ZERO3_PREFETCH_ELEMENTS,
    allocated_phases,
    cpu_phases,
    train_memory,
)
from tests.planning.toy_models import SMALL_BATCH, toy_model, training_setup

MODEL = toy_model()
P = 40_100_000  # its parameters
BUCKET = 50_000_000


def phase_bytes(zero_stage: int, ranks: int, phase: str, **changes) -> dict[str, float]:
    phases = {
        p.name: p for p in allocated_phases(MODEL, training_setup(zero_stage, ranks, **changes))
    }
    return {kind: size for kind, size in phases[phase].bytes_by_kind.items() if size}


def test_stage_0_in_fp32_holds_weights_gradients_and_two_moments() -> None:
    step = phase_bytes(0, 4, "step", bytes_per_weight=4)
    assert step == {
        "weights": 4 * P,
        "optimizer": 8 * P,
        "gradients": 4 * P,
        "buckets": 4 * P,  # all gradients once more, flat
    }


@pytest.mark.parametrize("ranks", [1, 4])
def test_stage_1_shares_master_weights_and_moments(ranks: int) -> None:
    backward = phase_bytes(1, ranks, "backward")
    assert backward["weights"] == 2 * P
    assert backward["optimizer"] == 12 * P / ranks
    assert (
        backward["gradients"] == 4 * P + 2 * MODEL.num_embedding
    )  # fp32, all; the embedding's waits
    assert backward["buckets"] == 4 * BUCKET


def test_stage_2_keeps_its_part_of_the_gradients_and_a_bucket_in_bf16() -> None:
    backward = phase_bytes(2, 4, "backward")
    assert backward["gradients"] == 4 * P / 4 + 2 * MODEL.num_embedding
    assert backward["buckets"] == 2 * BUCKET
    # a flat copy in bf16 and one in fp32 to communicate
    assert phase_bytes(2, 4, "reduce")["buckets"] == 2 * BUCKET + 2 * P + 4 * P


def test_stage_3_shares_the_weights_and_gathers_a_small_model_whole() -> None:
    assert phase_bytes(3, 4, "step")["weights"] == 2 * P / 4
    assert phase_bytes(3, 4, "backward")["weights"] == 2 * P / 4 + 2 * P


def test_stage_3_gathers_no_more_than_deepspeed_keeps() -> None:
    large = toy_model(300)  # 3 billion
    phases = {phase.name: phase for phase in allocated_phases(large, training_setup(3, 8))}
    gathered = phases["backward"].bytes_by_kind["weights"] - 2 * large.num_params / 8
    assert gathered == 2 * (ZERO3_LIVE_ELEMENTS + ZERO3_PREFETCH_ELEMENTS)


def test_offload_moves_the_optimizer_to_the_host() -> None:
    assert "optimizer" not in phase_bytes(2, 4, "backward", offload_optimizer=True)
    memory = train_memory(MODEL, training_setup(2, 4, offload_optimizer=True))
    part = P / 4
    assert memory.host_bytes == 12 * part + 8 * part + 2 * (part + 10_000_000)


def test_a_snapshot_is_three_numbers_of_each_parameter_on_the_host() -> None:
    host = train_memory(MODEL, training_setup(3, 4, is_saving_checkpoint=True)).host_bytes
    assert host == 3 * 4 * P / 4 + 4 * 10_000_000
    # a parameter is not cut
    shared = train_memory(MODEL, training_setup(3, 64, is_saving_checkpoint=True)).host_bytes
    assert shared == 3 * 4 * 10_000_000 + 4 * 10_000_000


def test_frozen_weights_have_neither_gradients_nor_moments() -> None:
    adapted = toy_model(frozen=3)
    phases = {p.name: p for p in allocated_phases(adapted, training_setup(1, 1))}
    assert phases["backward"].bytes_by_kind["optimizer"] == 12 * 10_000_000
    assert phases["backward"].bytes_by_kind["gradients"] == 4 * 10_000_000
    assert phases["backward"].bytes_by_kind["weights"] == 2 * P


def test_the_worst_phase_includes_the_cuda_context() -> None:
    memory = train_memory(MODEL, training_setup(2, 4))
    phases = allocated_phases(MODEL, training_setup(2, 4))
    assert (
        memory.worst_phase.total_bytes
        == max(phase.total_bytes for phase in phases) + CUDA_CONTEXT_BYTES
    )
    assert memory.worst_phase.name == max(phases, key=lambda phase: phase.total_bytes).name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_higher_stage_never_needs_more_of_many_gpus(checkpointing: bool) -> None:
    large = toy_model(500, vocab=10_000)
    batch = activations.MicroBatch(
        num_tokens=4096,
        num_labels=4096,
        loss_chunk_tokens=8192,
        activation_checkpointing=checkpointing,
    )
    totals = [
        train_memory(large, training_setup(stage, 32, micro_batch=batch)).worst_phase.total_bytes
        for stage in (1, 2, 3)
    ]
    assert totals == sorted(totals, reverse=True)


def test_memory_of_a_cpu_process_includes_freed_blocks() -> None:
    """The initial weights' memory stays unused at stage 1; at stage 2 activations reuse it."""
    one, two = (
        {
            p.name: p
            for p in cpu_phases(MODEL, training_setup(stage, 2, bytes_per_weight=4, on_gpu=False))
        }
        for stage in (1, 2)
    )
    assert one["step"].bytes_by_kind["freed"] == 4 * P
    assert (
        one["step"].bytes_by_kind["buckets"] == 4 * MODEL.num_decayed
    )  # gloo's copy of what it gathers
    work = 2 * 4 * MODEL.num_embedding + activations.saved_activations(MODEL, SMALL_BATCH, 4)
    work += activations.backward_buffers(MODEL, SMALL_BATCH, 4) + activations.logits_bytes(
        MODEL, SMALL_BATCH, 4
    )
    assert two["step"].bytes_by_kind["freed"] == 4 * P - work
    assert two["step"].bytes_by_kind["runtime"] == CPU_RUNTIME_BYTES


def test_assumed_settings_of_deepspeed_are_its_defaults() -> None:
    import torch
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from medgpt.config.train import EngineConfig
    from medgpt.engine.setup import deepspeed_config
    from medgpt.planning.communication import ZERO3_PERSISTENT_ELEMENTS

    ours = deepspeed_config(EngineConfig(zero_stage=3), torch.device("cpu"), max_grad_norm=1.0)
    zero = DeepSpeedZeroConfig(**ours["zero_optimization"])
    assert zero.reduce_bucket_size == zero.allgather_bucket_size == BUCKET
    assert zero.max_live_parameters == zero.max_reuse_distance == ZERO3_LIVE_ELEMENTS
    assert zero.prefetch_bucket_size == ZERO3_PREFETCH_ELEMENTS
    assert zero.param_persistence_threshold == ZERO3_PERSISTENT_ELEMENTS
    assert zero.overlap_comm
    assert not DeepSpeedZeroConfig(stage=2).overlap_comm
    assert zero.use_multi_rank_bucket_allreduce
    assert zero.contiguous_gradients

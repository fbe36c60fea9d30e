"""Memory by hand-computed numbers, and what must hold between settings."""

import pytest

from medgpt.planning import activations
from medgpt.planning.memory import (
    CONTEXT_BYTES,
    LIVE_PARAMETERS,
    PREFETCHED,
    RUNTIME_BYTES,
    live_phases,
    resident_phases,
    train_memory,
)
from tests.planning.toys import SMALL, setting, toy

MODEL = toy()
P = 40_100_000  # its parameters
BUCKET = 50_000_000


def held(zero_stage: int, ranks: int, phase: str, **changes) -> dict[str, float]:
    phases = {p.name: p for p in live_phases(MODEL, setting(zero_stage, ranks, **changes))}
    return {kind: size for kind, size in phases[phase].held.items() if size}


def test_stage_0_in_fp32_holds_weights_gradients_and_two_moments() -> None:
    step = held(0, 4, "step", b=4)
    assert step == {
        "weights": 4 * P,
        "optimizer": 8 * P,
        "gradients": 4 * P,
        "buckets": 4 * P,  # all gradients once more, flat
    }


@pytest.mark.parametrize("ranks", [1, 4])
def test_stage_1_shares_master_weights_and_moments(ranks: int) -> None:
    backward = held(1, ranks, "backward")
    assert backward["weights"] == 2 * P
    assert backward["optimizer"] == 12 * P / ranks
    assert backward["gradients"] == 4 * P + 2 * MODEL.embedding  # fp32, all; the embedding's waits
    assert backward["buckets"] == 4 * BUCKET


def test_stage_2_keeps_its_part_of_the_gradients_and_a_bucket_in_bf16() -> None:
    backward = held(2, 4, "backward")
    assert backward["gradients"] == 4 * P / 4 + 2 * MODEL.embedding
    assert backward["buckets"] == 2 * BUCKET
    # a flat copy in bf16 and one in fp32 to communicate
    assert held(2, 4, "reduce")["buckets"] == 2 * BUCKET + 2 * P + 4 * P


def test_stage_3_shares_the_weights_and_gathers_a_small_model_whole() -> None:
    assert held(3, 4, "step")["weights"] == 2 * P / 4
    assert held(3, 4, "backward")["weights"] == 2 * P / 4 + 2 * P


def test_stage_3_gathers_no_more_than_deepspeed_lets_live() -> None:
    large = toy(300)  # 3 billion
    phases = {phase.name: phase for phase in live_phases(large, setting(3, 8))}
    gathered = phases["backward"].held["weights"] - 2 * large.num_params / 8
    assert gathered == 2 * (LIVE_PARAMETERS + PREFETCHED)


def test_offload_moves_the_optimizer_to_the_host() -> None:
    assert "optimizer" not in held(2, 4, "backward", offload=True)
    memory = train_memory(MODEL, setting(2, 4, offload=True))
    part = P / 4
    assert memory.host == 12 * part + 8 * part + 2 * (part + 10_000_000)


def test_a_snapshot_is_three_numbers_of_each_parameter_on_the_host() -> None:
    host = train_memory(MODEL, setting(3, 4, snapshot=True)).host
    assert host == 3 * 4 * P / 4 + 4 * 10_000_000
    shared = train_memory(MODEL, setting(3, 64, snapshot=True)).host  # a parameter is not cut
    assert shared == 3 * 4 * 10_000_000 + 4 * 10_000_000


def test_frozen_weights_have_neither_gradients_nor_moments() -> None:
    adapted = toy(frozen=3)
    phases = {p.name: p for p in live_phases(adapted, setting(1, 1))}
    assert phases["backward"].held["optimizer"] == 12 * 10_000_000
    assert phases["backward"].held["gradients"] == 4 * 10_000_000
    assert phases["backward"].held["weights"] == 2 * P


def test_the_worst_phase_is_told_with_the_context_of_a_gpu() -> None:
    memory = train_memory(MODEL, setting(2, 4))
    phases = live_phases(MODEL, setting(2, 4))
    assert memory.device.total == max(phase.total for phase in phases) + CONTEXT_BYTES
    assert memory.device.name == max(phases, key=lambda phase: phase.total).name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_higher_stage_never_needs_more_of_many_gpus(checkpointing: bool) -> None:
    large = toy(500, vocab=10_000)
    batch = activations.Batch(tokens=4096, labels=4096, chunk=8192, checkpointing=checkpointing)
    totals = [
        train_memory(large, setting(stage, 32, batch=batch)).device.total for stage in (1, 2, 3)
    ]
    assert totals == sorted(totals, reverse=True)


def test_a_cpu_keeps_what_it_freed() -> None:
    """At stage 1 the initial weights' room; at stage 2 activations use it."""
    one, two = (
        {p.name: p for p in resident_phases(MODEL, setting(stage, 2, b=4, on_gpu=False))}
        for stage in (1, 2)
    )
    assert one["step"].held["freed"] == 4 * P
    assert one["step"].held["buckets"] == 4 * MODEL.num_decayed  # gloo's copy of what it gathers
    work = 2 * 4 * MODEL.embedding + activations.saved(MODEL, SMALL, 4)
    work += activations.backward_work(MODEL, SMALL, 4) + activations.logits(MODEL, SMALL, 4)
    assert two["step"].held["freed"] == 4 * P - work
    assert two["step"].held["runtime"] == RUNTIME_BYTES


def test_what_is_assumed_of_deepspeed_is_its_default() -> None:
    import torch
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from medgpt.config.train import EngineConfig
    from medgpt.engine.setup import deepspeed_config
    from medgpt.planning.traffic import PERSISTENT

    ours = deepspeed_config(EngineConfig(zero_stage=3), torch.device("cpu"), max_grad_norm=1.0)
    zero = DeepSpeedZeroConfig(**ours["zero_optimization"])
    assert zero.reduce_bucket_size == zero.allgather_bucket_size == BUCKET
    assert zero.max_live_parameters == zero.max_reuse_distance == LIVE_PARAMETERS
    assert zero.prefetch_bucket_size == PREFETCHED
    assert zero.param_persistence_threshold == PERSISTENT
    assert zero.overlap_comm
    assert not DeepSpeedZeroConfig(stage=2).overlap_comm
    assert zero.use_multi_rank_bucket_allreduce
    assert zero.contiguous_gradients

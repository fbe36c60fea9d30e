"""What a worker that trains holds in memory, by kind, in each phase of a step.

Model states as in Rajbhandari et al., 2019 (ZeRO, arXiv 1910.02054), section 3.1, for Adam with
fp32 master weights; beside them what DeepSpeed 0.19 and medgpt's engine allocate on the way.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from medgpt.config.train import BUCKET_ELEMENTS
from medgpt.models.model_shapes import ModelShape
from medgpt.planning import activations
from medgpt.planning.activations import MicroBatch

FP32, FP64 = 4, 8  # bytes
MIB, GIB = 2**20, 2**30

# DeepSpeed's defaults, which medgpt leaves as they are; in elements
ZERO3_LIVE_ELEMENTS = 1_000_000_000  # that ZeRO-3 gathers ahead, and keeps between their uses
ZERO3_PREFETCH_ELEMENTS = 50_000_000  # of them that travel together
ZERO0_ALL_REDUCE_ELEMENTS = 500_000_000  # gradients that stage 0 reduces in one call

CUDA_CONTEXT_BYTES = 1.5 * GIB
"""Of a GPU: CUDA's context, cuBLAS and NCCL. An assumption, not measured."""
CPU_RUNTIME_BYTES = 28 * MIB
"""Of a CPU process, above its memory after the imports, with next to no model: pages of libraries
that are read at their first use, and gloo's. `tests.bench.plan_memory` measures it."""

BytesByKind = Mapping[str, float]  # bytes by kind


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """How an engine is set up, and what its largest micro-batch is."""

    zero_stage: int
    num_ranks: int
    bytes_per_weight: int
    """Bytes of a weight in the forward pass: 2 in bf16, 4 in fp32."""
    micro_batch: MicroBatch
    offload_optimizer: bool
    on_gpu: bool
    is_saving_checkpoint: bool
    """A checkpoint is being written while training goes on."""


@dataclass(frozen=True, kw_only=True)
class StepPhase:
    """A moment of a step at which much is held."""

    name: str
    bytes_by_kind: BytesByKind

    @property
    def total_bytes(self) -> float:
        return sum(self.bytes_by_kind.values())


@dataclass(frozen=True, kw_only=True)
class WorkerMemory:
    """Of one worker, at its worst."""

    worst_phase: StepPhase
    """On the GPU, else all of it."""
    host_bytes: float
    """Bytes on the host of a GPU worker; 0 on a CPU."""


def train_memory(model: ModelShape, setup: TrainingSetup) -> WorkerMemory:
    """What a worker needs."""
    if not setup.on_gpu:
        return WorkerMemory(worst_phase=_largest_phase(cpu_phases(model, setup)), host_bytes=0)
    context = {"runtime": CUDA_CONTEXT_BYTES}
    phases = [
        StepPhase(name=phase.name, bytes_by_kind=_add_bytes(phase.bytes_by_kind, context))
        for phase in allocated_phases(model, setup)
    ]
    saving_bytes = _checkpoint_bytes(model, setup) + sum(offloaded_bytes(model, setup).values())
    return WorkerMemory(
        worst_phase=_largest_phase(phases),
        host_bytes=max(saving_bytes, _loading_bytes(model, setup)),
    )


def _largest_phase(phases: list[StepPhase]) -> StepPhase:
    return max(phases, key=lambda phase: phase.total_bytes)


# ---- what lives ----


def allocated_phases(model: ModelShape, setup: TrainingSetup) -> list[StepPhase]:
    """What is allocated on the device when weights are gathered, in the backward pass before and
    after gradients are reduced for the first time, and in the optimizer step."""
    stage = setup.zero_stage
    states, activation_memory = _model_states(model, setup), _activation_bytes(model, setup)
    gathered, accumulated = _gathered_weights(model, setup), _accumulated_gradients(model, setup)
    bucket = {"buckets": _bucket_bytes(setup)}
    stage_3_bucket = bucket if stage == 3 else {}
    # of the backward pass when the first bucket is full; stages 0 and 1 reduce after it
    remaining_share = 0.0 if stage < 2 else max(0.0, 1 - BUCKET_ELEMENTS / model.num_trainable)
    unfinished = {
        kind: remaining_share * size
        for kind, size in _add_bytes(activation_memory, gathered).items()
    }
    in_bucket = min(BUCKET_ELEMENTS, model.num_trainable)
    moved_to_bucket = {"gradients": -FP32 * in_bucket if stage == 1 else 0.0}
    return [
        StepPhase(
            name="gather",
            bytes_by_kind=_add_bytes(states, stage_3_bucket, _gather_buffers(model, setup)),
        ),
        StepPhase(
            name="backward",
            bytes_by_kind=_add_bytes(states, accumulated, bucket, gathered, activation_memory),
        ),
        StepPhase(
            name="reduce",
            bytes_by_kind=_add_bytes(
                states,
                accumulated,
                bucket,
                moved_to_bucket,
                _reduce_buffers(model, setup),
                unfinished,
            ),
        ),
        StepPhase(
            name="step",
            bytes_by_kind=_add_bytes(states, stage_3_bucket, _step_buffers(model, setup)),
        ),
    ]


def _model_states(model: ModelShape, setup: TrainingSetup) -> dict[str, float]:
    """Weights; fp32 master weights and the two moments of Adam; each in parts from the ZeRO stage
    on that says so. At stage 0 in fp32 the weights are their own masters."""
    trained, n, stage = model.num_trainable, setup.num_ranks, setup.zero_stage
    fp32_copies = 3 / n if stage else 2
    states = {
        "weights": setup.bytes_per_weight * model.num_params / (n if stage == 3 else 1),
        "gradients": FP32 * trained / n if stage == 3 else 0.0,
        "optimizer": FP32 * fp32_copies * trained,
    }
    if setup.offload_optimizer:  # a buffer for the largest gradient on its way
        return {
            "weights": states["weights"],
            "buckets": float(setup.bytes_per_weight * _largest_trained_weight(model)),
        }
    return states


def _activation_bytes(model: ModelShape, setup: TrainingSetup) -> dict[str, float]:
    """Activations, the output layer, and the dense gradient of an embedding, which waits for that
    of the output layer, or comes and goes where they are not one matrix."""
    b, batch = setup.bytes_per_weight, setup.micro_batch
    work = activations.backward_buffers(model, batch, b)
    return {
        "activations": float(activations.saved_activations(model, batch, b) + work),
        "logits": float(activations.logits_bytes(model, batch, b)),
        "gradients": float(_embedding_gradient_bytes(model, b)),
    }


def _embedding_gradient_bytes(model: ModelShape, b: int) -> int:
    return b * model.num_embedding if model.num_frozen == 0 else 0


def _accumulated_gradients(model: ModelShape, setup: TrainingSetup) -> dict[str, float]:
    """Gradients that wait between micro-batches: all of them at stages 0 and 1, in fp32; this
    rank's part at stage 2 (offloaded: on the host). At stage 3 they are among the states."""
    trained, n = FP32 * model.num_trainable, setup.num_ranks
    if setup.zero_stage < 2:
        return {"gradients": float(trained)}
    return {
        "gradients": trained / n if setup.zero_stage == 2 and not setup.offload_optimizer else 0.0
    }


def _bucket_bytes(setup: TrainingSetup) -> float:
    """The buffer that gradients are collected in, of the weights' dtype at stage 2, else fp32."""
    if setup.zero_stage == 0:
        return 0.0
    return float(BUCKET_ELEMENTS * (setup.bytes_per_weight if setup.zero_stage == 2 else FP32))


def _reduced_elements(model: ModelShape) -> int:
    """Elements that are reduced in one call: a bucket, or a gradient that is larger than one."""
    return max(min(BUCKET_ELEMENTS, model.num_trainable), _largest_trained_weight(model))


def _reduce_buffers(model: ModelShape, setup: TrainingSetup) -> dict[str, float]:
    """To reduce a bucket: a flat copy of it, at stage 2 in bf16 another one in fp32 to communicate,
    at stage 3 over gloo another one that is gloo's. What this rank keeps of it at stages 1 and 2;
    at stage 2 in fp32 that is a second part, whose sum with the first is taken afterwards."""
    stage, elements = setup.zero_stage, _reduced_elements(model)
    if stage == 0:
        return {}
    copies = float(setup.bytes_per_weight if stage == 2 else FP32)
    if (stage == 2 and setup.bytes_per_weight < FP32) or (stage == 3 and not setup.on_gpu):
        copies += FP32
    part = FP32 * model.num_trainable / setup.num_ranks
    has_several_buckets = model.num_trainable > BUCKET_ELEMENTS
    keeps_part = (
        has_several_buckets
        and (stage == 1 or (stage == 2 and setup.bytes_per_weight == FP32))
        and not setup.offload_optimizer
    )
    return {"buckets": copies * elements, "gradients": part if keeps_part else 0.0}


def _step_buffers(model: ModelShape, setup: TrainingSetup) -> dict[str, float]:
    """Stage 0 makes all gradients flat to reduce them. Stages 1 and 2 make this rank's part flat
    (in bf16 it is), of which the norm is taken in fp64, one gradient at a time; without gradients
    they then gather the weights, over gloo into a copy."""
    trained, n, stage = FP32 * model.num_trainable, setup.num_ranks, setup.zero_stage
    if stage == 0:
        return {"gradients": float(trained), "buckets": _flat_copy_bytes(model, setup)}
    parts = 2 if setup.bytes_per_weight == FP32 and stage < 3 else 1
    gradients = (
        0.0
        if setup.offload_optimizer
        else parts * trained / n + FP64 * _largest_trained_weight(model) / n
    )
    copy = _flat_copy_bytes(model, setup)
    return {"gradients": gradients} if gradients > copy else {"buckets": copy}


def _flat_copy_bytes(model: ModelShape, setup: TrainingSetup) -> float:
    """In the step: gradients made flat at stage 0, gloo's copy of weights at stages 1 and 2."""
    if setup.zero_stage == 0:
        return float(
            FP32
            * min(model.num_trainable, ZERO0_ALL_REDUCE_ELEMENTS + _largest_trained_weight(model))
        )
    gloo = setup.zero_stage < 3 and not setup.on_gpu
    return float(setup.bytes_per_weight * model.num_decayed) if gloo else 0.0


def _gathered_weights(model: ModelShape, setup: TrainingSetup) -> dict[str, float]:
    """Whole weights at ZeRO-3. DeepSpeed gathers ahead up to LIVE_PARAMETERS, and lets go of none
    that it uses again within as many: a smaller model is whole through forward and backward."""
    if setup.zero_stage < 3:
        return {}
    return {
        "weights": float(
            setup.bytes_per_weight
            * min(model.num_params, ZERO3_LIVE_ELEMENTS + ZERO3_PREFETCH_ELEMENTS)
        )
    }


def _gather_buffers(model: ModelShape, setup: TrainingSetup) -> dict[str, float]:
    """ZeRO-3 at the begin of a forward pass: flat buffers on their way, and the weights that are
    copied out of the first. Over gloo two travel at a time, which it copies, and the others are
    asked for once the first is there."""
    if setup.zero_stage < 3:
        return {}
    flat = min(model.num_params, ZERO3_LIVE_ELEMENTS)
    first, copies = min(flat, ZERO3_PREFETCH_ELEMENTS), 0
    if not setup.on_gpu:
        flat = max(min(flat, 2 * ZERO3_PREFETCH_ELEMENTS), flat - ZERO3_PREFETCH_ELEMENTS)
        copies = min(flat, 2 * ZERO3_PREFETCH_ELEMENTS)
    return {
        "weights": float(setup.bytes_per_weight * first),
        "buckets": float(setup.bytes_per_weight * (flat + copies)),
    }


def _largest_trained_weight(model: ModelShape) -> int:
    return max(weight.num_elements for weight in model.weights if weight.trainable)


# ---- beside the device ----


def _checkpoint_bytes(model: ModelShape, setup: TrainingSetup) -> float:
    """A checkpoint on its way to disk: fp32 weights and moments of the parameters that the rank
    writes, each whole, shared out by size; and one that is gathered."""
    if not setup.is_saving_checkpoint:
        return 0.0
    share = max(model.num_trainable / setup.num_ranks, _largest_trained_weight(model))
    return FP32 * (3 * share + _largest_trained_weight(model))


def _loading_bytes(model: ModelShape, setup: TrainingSetup) -> float:
    """Weights on their way from disk to the device: all of them, at ZeRO-3 one tensor at a time."""
    largest = max(weight.num_elements for weight in model.weights)
    return float(setup.bytes_per_weight * (largest if setup.zero_stage == 3 else model.num_params))


def offloaded_bytes(model: ModelShape, setup: TrainingSetup) -> dict[str, float]:
    """On the host: this rank's part of master weights and moments, of the gradients twice, of the
    weights in their dtype, and a buffer for the largest gradient."""
    if not setup.offload_optimizer:
        return {}
    part = model.num_trainable / setup.num_ranks
    return {
        "optimizer": 3 * FP32 * part,
        "gradients": 2 * FP32 * part,
        "buckets": setup.bytes_per_weight * (part + _largest_trained_weight(model)),
    }


# ---- a CPU ----


def cpu_phases(model: ModelShape, setup: TrainingSetup) -> list[StepPhase]:
    """The phases as a process on a CPU shows them: with what it has freed_bytes and keeps.

    `engine.setup.keep_freed_memory` lets all but large blocks stay in the heap. What activations
    leave is used again for activations. But gradients that wait between micro-batches (stages 0
    and 1) and weights that stay gathered (stage 3) lie between them and split the room, so it is
    not used for one another. Nor is at stage 1 the room that the initial weights leave when ZeRO
    flat_copies them into flat buffers; at stage 2 nothing lies between, and activations use it; at
    stage 3 it is there before the states are made, which use it. A checkpoint uses it, too, it
    consists of blocks of the same sizes. Large blocks go back when freed_bytes.
    """
    stage, checkpoint = setup.zero_stage, _checkpoint_bytes(model, setup)
    persistent = (
        _accumulated_gradients(model, setup) if stage < 2 else _gathered_weights(model, setup)
    )
    # the gradient of the embedding itself beside the one that waits
    activation_memory = _add_bytes(
        _activation_bytes(model, setup),
        {"gradients": _embedding_gradient_bytes(model, setup.bytes_per_weight)},
    )
    initial_weights = setup.bytes_per_weight * model.num_params
    freed_bytes = {
        0: 0.0,
        1: initial_weights,
        2: initial_weights - sum(activation_memory.values()),
        3: 0.0,
    }[stage]
    heap = _add_bytes(
        *(
            _model_states(model, setup),
            offloaded_bytes(model, setup),
            persistent,
            activation_memory,
        ),
        {
            "snapshot": checkpoint,
            "freed": max(0.0, freed_bytes - checkpoint),
            "runtime": CPU_RUNTIME_BYTES,
        },
    )
    # pages of the bucket are there once they are written_bucket_bytes to
    written_bucket_bytes = _bucket_bytes(setup) * min(1.0, model.num_trainable / BUCKET_ELEMENTS)
    bucket = {"buckets": written_bucket_bytes if stage >= 2 else 0.0}
    if stage == 3:
        heap, bucket = _add_bytes(heap, bucket), {}
    gather_buffers = {"buckets": _gather_buffers(model, setup).get("buckets", 0.0)}
    # at stages 0 and 1 there is room in the heap for what gradients are copied to
    reduce_buffers = _add_bytes(
        bucket, _accumulated_gradients(model, setup), _reduce_buffers(model, setup)
    )
    flat_copies = {"buckets": _flat_copy_bytes(model, setup)}
    return [
        StepPhase(name="gather", bytes_by_kind=_add_bytes(heap, gather_buffers)),
        StepPhase(
            name="reduce", bytes_by_kind=_add_bytes(heap, reduce_buffers if stage >= 2 else {})
        ),
        StepPhase(name="step", bytes_by_kind=_add_bytes(heap, flat_copies)),
    ]


def _add_bytes(*parts: BytesByKind) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for kind, size in part.items():
            total[kind] = total.get(kind, 0) + size
    return total

"""Memory of a training worker, by kind, in each phase of an optimizer step.

Model states follow Rajbhandari et al., 2019 (ZeRO, arXiv 1910.02054), section 3.1, for Adam with
fp32 master weights; to them come the buffers that DeepSpeed 0.19 and medgpt's engine allocate.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from medgpt.config.train import BUCKET_ELEMENTS
from medgpt.models.model_shapes import ModelShape
from medgpt.planning import activations
from medgpt.planning.activations import MicroBatch

FP32, FP64 = 4, 8  # bytes
MIB, GIB = 2**20, 2**30

# defaults of DeepSpeed that medgpt does not change, in elements
ZERO3_LIVE_ELEMENTS = 1_000_000_000  # max_live_parameters and max_reuse_distance
ZERO3_PREFETCH_ELEMENTS = 50_000_000  # prefetch_bucket_size
ZERO0_ALL_REDUCE_ELEMENTS = 500_000_000  # gradients that stage 0 reduces in one call

CUDA_CONTEXT_BYTES = 1.5 * GIB
"""CUDA context, cuBLAS and NCCL on a GPU. Assumed, not measured."""
CPU_RUNTIME_BYTES = 28 * MIB
"""Memory of a CPU process with a tiny model beyond that after the imports: library pages read at
first use, and gloo. Measured by `tests.bench.plan_memory`."""

BytesByKind = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """Settings of an engine and its largest micro-batch."""

    zero_stage: int
    num_ranks: int
    bytes_per_weight: int
    """Bytes of a weight in the forward pass: 2 for bf16, 4 for fp32."""
    micro_batch: MicroBatch
    offload_optimizer: bool
    on_gpu: bool
    is_saving_checkpoint: bool
    """Whether a checkpoint is written while training continues."""


@dataclass(frozen=True, kw_only=True)
class StepPhase:
    """A moment of the optimizer step with high memory use."""

    name: str
    bytes_by_kind: BytesByKind

    @property
    def total_bytes(self) -> float:
        return sum(self.bytes_by_kind.values())


@dataclass(frozen=True, kw_only=True)
class WorkerMemory:
    """Peak memory of one worker."""

    worst_phase: StepPhase
    """The phase with the most memory, on the GPU or of the CPU process."""
    host_bytes: float
    """Host memory of a GPU worker in bytes; 0 for a CPU worker."""


def train_memory(model: ModelShape, setup: TrainingSetup) -> WorkerMemory:
    """Return the peak memory of a training worker."""
    if not setup.on_gpu:
        return WorkerMemory(worst_phase=_largest(cpu_phases(model, setup)), host_bytes=0)
    context = {"runtime": CUDA_CONTEXT_BYTES}
    phases = [_phase(p.name, p.bytes_by_kind, context) for p in allocated_phases(model, setup)]
    saving = _checkpoint_bytes(model, setup) + sum(offloaded_bytes(model, setup).values())
    host_bytes = max(saving, _loading_bytes(model, setup))
    return WorkerMemory(worst_phase=_largest(phases), host_bytes=host_bytes)


def _phase(name: str, *parts: BytesByKind) -> StepPhase:
    return StepPhase(name=name, bytes_by_kind=_add_bytes(*parts))


def _largest(phases: list[StepPhase]) -> StepPhase:
    return max(phases, key=lambda phase: phase.total_bytes)


# ---- allocated on the device ----


def allocated_phases(model: ModelShape, setup: TrainingSetup) -> list[StepPhase]:
    """Return the memory allocated on the device in four phases: weights are gathered, the backward
    pass before and after the first reduction of gradients, and the optimizer step."""
    stage = setup.zero_stage
    states, activation_memory = _model_states(model, setup), _activation_bytes(model, setup)
    gathered, accumulated = _gathered_weights(model, setup), _accumulated_gradients(model, setup)
    bucket = {"buckets": _bucket_bytes(setup)}
    stage_3_bucket = bucket if stage == 3 else {}
    # share of the backward pass left when the first bucket is full; stages 0 and 1 reduce after it
    remaining_share = 0.0 if stage < 2 else max(0.0, 1 - BUCKET_ELEMENTS / model.num_trainable)
    backward = _add_bytes(activation_memory, gathered)
    unfinished = {kind: remaining_share * size for kind, size in backward.items()}
    in_bucket = min(BUCKET_ELEMENTS, model.num_trainable)
    moved = {"gradients": -FP32 * in_bucket if stage == 1 else 0.0}
    buffers = _reduce_buffers(model, setup)
    return [
        _phase("gather", states, stage_3_bucket, _gather_buffers(model, setup)),
        _phase("backward", states, accumulated, bucket, gathered, activation_memory),
        _phase("reduce", states, accumulated, bucket, moved, buffers, unfinished),
        _phase("step", states, stage_3_bucket, _step_buffers(model, setup)),
    ]


def _model_states(model: ModelShape, setup: TrainingSetup) -> dict[str, float]:
    """Return weights, fp32 master weights and Adam's two moments, partitioned as the ZeRO stage
    defines. At stage 0 in fp32 the weights are their own master weights."""
    trained, n, stage = model.num_trainable, setup.num_ranks, setup.zero_stage
    b = setup.bytes_per_weight
    weights = model.weight_bytes(b) / (n if stage == 3 else 1)
    if setup.offload_optimizer:  # the buffer holds the largest gradient while it is copied
        return {"weights": weights, "buckets": float(b * _largest_gradient(model))}
    return {
        "weights": weights,
        "gradients": FP32 * trained / n if stage == 3 else 0.0,
        "optimizer": FP32 * (3 / n if stage else 2) * trained,
    }


def _activation_bytes(model: ModelShape, setup: TrainingSetup) -> dict[str, float]:
    """Return activations, logits and the dense gradient of the embedding, which waits for that of a
    tied output layer and is freed at once if they are not tied."""
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
    """Return gradients kept between micro-batches: all of them in fp32 at stages 0 and 1, the
    rank's part at stage 2 unless it is offloaded. At stage 3 they are part of the model states."""
    trained, n = FP32 * model.num_trainable, setup.num_ranks
    if setup.zero_stage < 2:
        return {"gradients": float(trained)}
    is_kept = setup.zero_stage == 2 and not setup.offload_optimizer
    return {"gradients": trained / n if is_kept else 0.0}


def _bucket_bytes(setup: TrainingSetup) -> float:
    """Return the size of the gradient bucket, in the weights' dtype at stage 2, else in fp32."""
    if setup.zero_stage == 0:
        return 0.0
    return float(BUCKET_ELEMENTS * (setup.bytes_per_weight if setup.zero_stage == 2 else FP32))


def _reduce_buffers(model: ModelShape, setup: TrainingSetup) -> dict[str, float]:
    """Return the buffers that reduce a bucket: a flat copy, at stage 2 in bf16 a second one in
    fp32, at stage 3 over gloo a second one inside gloo. At stages 1 and 2 the rank keeps its part
    of the result; at stage 2 in fp32 this is a second part, which is added to the first
    afterwards."""
    stage, b = setup.zero_stage, setup.bytes_per_weight
    if stage == 0:
        return {}
    copies = float(b if stage == 2 else FP32)
    if (stage == 2 and b < FP32) or (stage == 3 and not setup.on_gpu):
        copies += FP32
    has_several_buckets = model.num_trainable > BUCKET_ELEMENTS
    keeps_part = stage == 1 or (stage == 2 and b == FP32)
    if not has_several_buckets or setup.offload_optimizer:
        keeps_part = False
    part = FP32 * model.num_trainable / setup.num_ranks
    # a bucket, or a single gradient that is larger
    reduced = max(min(BUCKET_ELEMENTS, model.num_trainable), _largest_gradient(model))
    return {"buckets": copies * reduced, "gradients": part if keeps_part else 0.0}


def _step_buffers(model: ModelShape, setup: TrainingSetup) -> dict[str, float]:
    """Return the buffers of the optimizer step. Stage 0 flattens all gradients to reduce them.
    Stages 1 and 2 flatten the rank's part (in bf16 it is flat) and compute its norm in fp64, one
    gradient at a time; they then free the gradients and gather the weights, which gloo copies."""
    trained, n, stage = FP32 * model.num_trainable, setup.num_ranks, setup.zero_stage
    if stage == 0:
        return {"gradients": float(trained), "buckets": _flat_copy_bytes(model, setup)}
    parts = 2 if setup.bytes_per_weight == FP32 and stage < 3 else 1
    gradients = parts * trained / n + FP64 * _largest_gradient(model) / n
    if setup.offload_optimizer:
        gradients = 0.0
    copy = _flat_copy_bytes(model, setup)
    return {"gradients": gradients} if gradients > copy else {"buckets": copy}


def _flat_copy_bytes(model: ModelShape, setup: TrainingSetup) -> float:
    """Return the flat gradients at stage 0, gloo's copy of weights at stages 1 and 2."""
    if setup.zero_stage == 0:
        largest_call = ZERO0_ALL_REDUCE_ELEMENTS + _largest_gradient(model)
        return float(FP32 * min(model.num_trainable, largest_call))
    gloo = setup.zero_stage < 3 and not setup.on_gpu
    return float(setup.bytes_per_weight * model.num_decayed) if gloo else 0.0


def _gathered_weights(model: ModelShape, setup: TrainingSetup) -> dict[str, float]:
    """Return the whole weights at ZeRO-3. DeepSpeed gathers up to ZERO3_LIVE_ELEMENTS ahead and
    keeps those that it uses again within as many, so a smaller model stays whole in both passes."""
    if setup.zero_stage < 3:
        return {}
    elements = min(model.num_params, ZERO3_LIVE_ELEMENTS + ZERO3_PREFETCH_ELEMENTS)
    return {"weights": float(setup.bytes_per_weight * elements)}


def _gather_buffers(model: ModelShape, setup: TrainingSetup) -> dict[str, float]:
    """Return the buffers at the start of a ZeRO-3 forward pass: flat buffers being received, and
    the weights copied out of the first one. gloo receives two at a time, copies them, and requests
    the others after the first has arrived."""
    if setup.zero_stage < 3:
        return {}
    b = setup.bytes_per_weight
    flat = min(model.num_params, ZERO3_LIVE_ELEMENTS)
    first, copies = min(flat, ZERO3_PREFETCH_ELEMENTS), 0
    if not setup.on_gpu:
        flat = max(min(flat, 2 * ZERO3_PREFETCH_ELEMENTS), flat - ZERO3_PREFETCH_ELEMENTS)
        copies = min(flat, 2 * ZERO3_PREFETCH_ELEMENTS)
    return {"weights": float(b * first), "buckets": float(b * (flat + copies))}


def _largest_gradient(model: ModelShape) -> int:
    return max(weight.num_elements for weight in model.weights if weight.trainable)


# ---- host memory of a GPU worker ----


def _checkpoint_bytes(model: ModelShape, setup: TrainingSetup) -> float:
    """Return a checkpoint being written: fp32 weights and moments of the parameters that the rank
    writes, balanced by size and never split, and one parameter being gathered."""
    if not setup.is_saving_checkpoint:
        return 0.0
    share = max(model.num_trainable / setup.num_ranks, _largest_gradient(model))
    return FP32 * (3 * share + _largest_gradient(model))


def _loading_bytes(model: ModelShape, setup: TrainingSetup) -> float:
    """Return the weights being read from disk: all of them, at ZeRO-3 one tensor at a time."""
    largest = max(weight.num_elements for weight in model.weights)
    return float(setup.bytes_per_weight * (largest if setup.zero_stage == 3 else model.num_params))


def offloaded_bytes(model: ModelShape, setup: TrainingSetup) -> dict[str, float]:
    """Return the host memory of offloading: the rank's part of master weights and moments, twice
    its gradients, its weights in their dtype, and a buffer for the largest gradient."""
    if not setup.offload_optimizer:
        return {}
    part = model.num_trainable / setup.num_ranks
    return {
        "optimizer": 3 * FP32 * part,
        "gradients": 2 * FP32 * part,
        "buckets": setup.bytes_per_weight * (part + _largest_gradient(model)),
    }


# ---- resident memory of a CPU worker ----


def cpu_phases(model: ModelShape, setup: TrainingSetup) -> list[StepPhase]:
    """Return the phases as resident memory of a CPU process, including memory it freed but keeps.

    `engine.setup.keep_freed_memory` keeps all but large blocks in the heap. Activations reuse the
    blocks of activations. But gradients that wait between micro-batches (stages 0 and 1) and
    weights that stay gathered (stage 3) fragment the heap, so their blocks are not reused for one
    another. Nor, at stage 1, are those of the initial weights, which ZeRO copies into flat buffers;
    at stage 2 nothing lies between, and activations reuse them; at stage 3 they are freed before
    the model states are created, which reuse them. A checkpoint, made of blocks of the same sizes,
    reuses them too. Large blocks are returned to the system when freed.
    """
    stage, b, checkpoint = setup.zero_stage, setup.bytes_per_weight, _checkpoint_bytes(model, setup)
    accumulated = _accumulated_gradients(model, setup)
    persistent = accumulated if stage < 2 else _gathered_weights(model, setup)
    # the gradient of the embedding, beside the one that waits for the output layer
    embedding = {"gradients": _embedding_gradient_bytes(model, b)}
    activation_memory = _add_bytes(_activation_bytes(model, setup), embedding)
    freed = {1: b * model.num_params, 2: b * model.num_params - sum(activation_memory.values())}
    others = {
        "snapshot": checkpoint,
        "freed": max(0.0, freed.get(stage, 0.0) - checkpoint),
        "runtime": CPU_RUNTIME_BYTES,
    }
    states, offloaded = _model_states(model, setup), offloaded_bytes(model, setup)
    heap = _add_bytes(states, offloaded, persistent, activation_memory, others)
    # pages of the bucket become resident when they are written
    written_bytes = _bucket_bytes(setup) * min(1.0, model.num_trainable / BUCKET_ELEMENTS)
    bucket = {"buckets": written_bytes if stage >= 2 else 0.0}
    if stage == 3:
        heap, bucket = _add_bytes(heap, bucket), {}
    gather_buffers = {"buckets": _gather_buffers(model, setup).get("buckets", 0.0)}
    # at stages 0 and 1 the heap has room for the copies of gradients
    reduce_buffers = _add_bytes(bucket, accumulated, _reduce_buffers(model, setup))
    return [
        _phase("gather", heap, gather_buffers),
        _phase("reduce", heap, reduce_buffers if stage >= 2 else {}),
        _phase("step", heap, {"buckets": _flat_copy_bytes(model, setup)}),
    ]


def _add_bytes(*parts: BytesByKind) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for kind, size in part.items():
            total[kind] = total.get(kind, 0) + size
    return total

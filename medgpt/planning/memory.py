"""What a worker that trains holds in memory, by kind, in each phase of a step.

Model states as in Rajbhandari et al., 2019 (ZeRO, arXiv 1910.02054), section 3.1, for Adam with
fp32 master weights; beside them what DeepSpeed 0.19 and medgpt's engine allocate on the way.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from medgpt.config.train import BUCKET_ELEMENTS
from medgpt.models.model_shapes import Outline
from medgpt.planning import activations
from medgpt.planning.activations import Batch

FP32, FP64 = 4, 8  # bytes
MIB, GIB = 2**20, 2**30

# DeepSpeed's defaults, which medgpt leaves as they are; in elements
LIVE_PARAMETERS = 1_000_000_000  # that ZeRO-3 gathers ahead, and keeps between their uses
PREFETCHED = 50_000_000  # of them that travel together
ALL_REDUCED = 500_000_000  # gradients that stage 0 reduces in one call

CONTEXT_BYTES = 1.5 * GIB
"""Of a GPU: CUDA's context, cuBLAS and NCCL. An assumption, not measured."""
RUNTIME_BYTES = 28 * MIB
"""Of a CPU process, above its memory after the imports, with next to no model: pages of libraries
that are read at their first use, and gloo's. `tests.bench.plan_memory` measures it."""

Held = Mapping[str, float]  # bytes by kind


@dataclass(frozen=True, kw_only=True)
class Training:
    """How an engine is set up, and what its largest micro-batch is."""

    zero_stage: int
    num_ranks: int
    b: int
    """Bytes of a weight in the forward pass: 2 in bf16, 4 in fp32."""
    batch: Batch
    offload: bool
    on_gpu: bool
    snapshot: bool
    """A checkpoint is being written while training goes on."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A moment of a step at which much is held."""

    name: str
    held: Held

    @property
    def total(self) -> float:
        return sum(self.held.values())


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of one worker, at its worst."""

    device: Phase
    """On the GPU, else all of it."""
    host: float
    """Bytes on the host of a GPU worker; 0 on a CPU."""


def train_memory(model: Outline, setting: Training) -> Memory:
    """What a worker needs."""
    if not setting.on_gpu:
        return Memory(device=_worst(resident_phases(model, setting)), host=0)
    context = {"runtime": CONTEXT_BYTES}
    phases = [
        Phase(name=phase.name, held=_sum(phase.held, context))
        for phase in live_phases(model, setting)
    ]
    saving = _snapshot(model, setting) + sum(offloaded(model, setting).values())
    return Memory(device=_worst(phases), host=max(saving, _read(model, setting)))


def _worst(phases: list[Phase]) -> Phase:
    return max(phases, key=lambda phase: phase.total)


# ---- what lives ----


def live_phases(model: Outline, setting: Training) -> list[Phase]:
    """What is allocated on the device when weights are gathered, in the backward pass before and
    after gradients are reduced for the first time, and in the optimizer step."""
    stage = setting.zero_stage
    states, work = _states(model, setting), _work(model, setting)
    gathered, kept = _gathered(model, setting), _kept_gradients(model, setting)
    bucket = {"buckets": _bucket(setting)}
    always = bucket if stage == 3 else {}
    # of the backward pass when the first bucket is full; stages 0 and 1 reduce after it
    left = 0.0 if stage < 2 else max(0.0, 1 - BUCKET_ELEMENTS / model.num_trainable)
    early = {kind: left * size for kind, size in _sum(work, gathered).items()}
    in_bucket = min(BUCKET_ELEMENTS, model.num_trainable)
    moved = {"gradients": -FP32 * in_bucket if stage == 1 else 0.0}
    return [
        Phase(name="gather", held=_sum(states, always, _gathering(model, setting))),
        Phase(name="backward", held=_sum(states, kept, bucket, gathered, work)),
        Phase(name="reduce", held=_sum(states, kept, bucket, moved, _flush(model, setting), early)),
        Phase(name="step", held=_sum(states, always, _step(model, setting))),
    ]


def _states(model: Outline, setting: Training) -> dict[str, float]:
    """Weights; fp32 master weights and the two moments of Adam; each in parts from the ZeRO stage
    on that says so. At stage 0 in fp32 the weights are their own masters."""
    trained, n, stage = model.num_trainable, setting.num_ranks, setting.zero_stage
    numbers = 3 / n if stage else 2
    held = {
        "weights": setting.b * model.num_params / (n if stage == 3 else 1),
        "gradients": FP32 * trained / n if stage == 3 else 0.0,
        "optimizer": FP32 * numbers * trained,
    }
    if setting.offload:  # a buffer for the largest gradient on its way
        return {"weights": held["weights"], "buckets": float(setting.b * _largest(model))}
    return held


def _work(model: Outline, setting: Training) -> dict[str, float]:
    """Activations, the output layer, and the dense gradient of an embedding, which waits for that
    of the output layer, or comes and goes where they are not one matrix."""
    b, batch = setting.b, setting.batch
    work = activations.backward_work(model, batch, b)
    return {
        "activations": float(activations.saved(model, batch, b) + work),
        "logits": float(activations.logits(model, batch, b)),
        "gradients": float(_embedding_gradient(model, b)),
    }


def _embedding_gradient(model: Outline, b: int) -> int:
    return b * model.embedding if model.num_frozen == 0 else 0


def _kept_gradients(model: Outline, setting: Training) -> dict[str, float]:
    """Gradients that wait between micro-batches: all of them at stages 0 and 1, in fp32; this
    rank's part at stage 2 (offloaded: on the host). At stage 3 they are among the states."""
    trained, n = FP32 * model.num_trainable, setting.num_ranks
    if setting.zero_stage < 2:
        return {"gradients": float(trained)}
    return {"gradients": trained / n if setting.zero_stage == 2 and not setting.offload else 0.0}


def _bucket(setting: Training) -> float:
    """The buffer that gradients are collected in, of the weights' dtype at stage 2, else fp32."""
    if setting.zero_stage == 0:
        return 0.0
    return float(BUCKET_ELEMENTS * (setting.b if setting.zero_stage == 2 else FP32))


def _bucketed(model: Outline) -> int:
    """Elements that are reduced in one call: a bucket, or a gradient that is larger than one."""
    return max(min(BUCKET_ELEMENTS, model.num_trainable), _largest(model))


def _flush(model: Outline, setting: Training) -> dict[str, float]:
    """To reduce a bucket: a flat copy of it, at stage 2 in bf16 another one in fp32 to communicate,
    at stage 3 over gloo another one that is gloo's. What this rank keeps of it at stages 1 and 2;
    at stage 2 in fp32 that is a second part, whose sum with the first is taken afterwards."""
    stage, elements = setting.zero_stage, _bucketed(model)
    if stage == 0:
        return {}
    copies = float(setting.b if stage == 2 else FP32)
    if (stage == 2 and setting.b < FP32) or (stage == 3 and not setting.on_gpu):
        copies += FP32
    part = FP32 * model.num_trainable / setting.num_ranks
    several = model.num_trainable > BUCKET_ELEMENTS
    keeps = several and (stage == 1 or (stage == 2 and setting.b == FP32)) and not setting.offload
    return {"buckets": copies * elements, "gradients": part if keeps else 0.0}


def _step(model: Outline, setting: Training) -> dict[str, float]:
    """Stage 0 makes all gradients flat to reduce them. Stages 1 and 2 make this rank's part flat
    (in bf16 it is), of which the norm is taken in fp64, one gradient at a time; without gradients
    they then gather the weights, over gloo into a copy."""
    trained, n, stage = FP32 * model.num_trainable, setting.num_ranks, setting.zero_stage
    if stage == 0:
        return {"gradients": float(trained), "buckets": _copied(model, setting)}
    parts = 2 if setting.b == FP32 and stage < 3 else 1
    gradients = 0.0 if setting.offload else parts * trained / n + FP64 * _largest(model) / n
    copy = _copied(model, setting)
    return {"gradients": gradients} if gradients > copy else {"buckets": copy}


def _copied(model: Outline, setting: Training) -> float:
    """In the step: gradients made flat at stage 0, gloo's copy of weights at stages 1 and 2."""
    if setting.zero_stage == 0:
        return float(FP32 * min(model.num_trainable, ALL_REDUCED + _largest(model)))
    gloo = setting.zero_stage < 3 and not setting.on_gpu
    return float(setting.b * model.num_decayed) if gloo else 0.0


def _gathered(model: Outline, setting: Training) -> dict[str, float]:
    """Whole weights at ZeRO-3. DeepSpeed gathers ahead up to LIVE_PARAMETERS, and lets go of none
    that it uses again within as many: a smaller model is whole through forward and backward."""
    if setting.zero_stage < 3:
        return {}
    return {"weights": float(setting.b * min(model.num_params, LIVE_PARAMETERS + PREFETCHED))}


def _gathering(model: Outline, setting: Training) -> dict[str, float]:
    """ZeRO-3 at the begin of a forward pass: flat buffers on their way, and the weights that are
    copied out of the first. Over gloo two travel at a time, which it copies, and the others are
    asked for once the first is there."""
    if setting.zero_stage < 3:
        return {}
    flat = min(model.num_params, LIVE_PARAMETERS)
    first, copies = min(flat, PREFETCHED), 0
    if not setting.on_gpu:
        flat = max(min(flat, 2 * PREFETCHED), flat - PREFETCHED)
        copies = min(flat, 2 * PREFETCHED)
    return {"weights": float(setting.b * first), "buckets": float(setting.b * (flat + copies))}


def _largest(model: Outline) -> int:
    return max(weight.numel for weight in model.weights if weight.trainable)


# ---- beside the device ----


def _snapshot(model: Outline, setting: Training) -> float:
    """A checkpoint on its way to disk: fp32 weights and moments of the parameters that the rank
    writes, each whole, shared out by size; and one that is gathered."""
    if not setting.snapshot:
        return 0.0
    share = max(model.num_trainable / setting.num_ranks, _largest(model))
    return FP32 * (3 * share + _largest(model))


def _read(model: Outline, setting: Training) -> float:
    """Weights on their way from disk to the device: all of them, at ZeRO-3 one tensor at a time."""
    largest = max(weight.numel for weight in model.weights)
    return float(setting.b * (largest if setting.zero_stage == 3 else model.num_params))


def offloaded(model: Outline, setting: Training) -> dict[str, float]:
    """On the host: this rank's part of master weights and moments, of the gradients twice, of the
    weights in their dtype, and a buffer for the largest gradient."""
    if not setting.offload:
        return {}
    part = model.num_trainable / setting.num_ranks
    return {
        "optimizer": 3 * FP32 * part,
        "gradients": 2 * FP32 * part,
        "buckets": setting.b * (part + _largest(model)),
    }


# ---- a CPU ----


def resident_phases(model: Outline, setting: Training) -> list[Phase]:
    """The phases as a process on a CPU shows them: with what it has freed and keeps.

    `engine.setup.keep_freed_memory` lets all but large blocks stay in the heap. What activations
    leave is used again for activations. But gradients that wait between micro-batches (stages 0
    and 1) and weights that stay gathered (stage 3) lie between them and split the room, so it is
    not used for one another. Nor is at stage 1 the room that the initial weights leave when ZeRO
    copies them into flat buffers; at stage 2 nothing lies between, and activations use it; at
    stage 3 it is there before the states are made, which use it. A snapshot uses it, too, it
    consists of blocks of the same sizes. Large blocks go back when freed.
    """
    stage, snapshot = setting.zero_stage, _snapshot(model, setting)
    lasting = _kept_gradients(model, setting) if stage < 2 else _gathered(model, setting)
    # the gradient of the embedding itself beside the one that waits
    work = _sum(_work(model, setting), {"gradients": _embedding_gradient(model, setting.b)})
    initial = setting.b * model.num_params
    freed = {0: 0.0, 1: initial, 2: initial - sum(work.values()), 3: 0.0}[stage]
    heap = _sum(
        *(_states(model, setting), offloaded(model, setting), lasting, work),
        {
            "snapshot": snapshot,
            "freed": max(0.0, freed - snapshot),
            "runtime": RUNTIME_BYTES,
        },
    )
    # pages of the bucket are there once they are written to
    written = _bucket(setting) * min(1.0, model.num_trainable / BUCKET_ELEMENTS)
    bucket = {"buckets": written if stage >= 2 else 0.0}
    if stage == 3:
        heap, bucket = _sum(heap, bucket), {}
    gathering = {"buckets": _gathering(model, setting).get("buckets", 0.0)}
    # at stages 0 and 1 there is room in the heap for what gradients are copied to
    flush = _sum(bucket, _kept_gradients(model, setting), _flush(model, setting))
    copies = {"buckets": _copied(model, setting)}
    return [
        Phase(name="gather", held=_sum(heap, gathering)),
        Phase(name="reduce", held=_sum(heap, flush if stage >= 2 else {})),
        Phase(name="step", held=_sum(heap, copies)),
    ]


def _sum(*parts: Held) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for kind, size in part.items():
            total[kind] = total.get(kind, 0) + size
    return total

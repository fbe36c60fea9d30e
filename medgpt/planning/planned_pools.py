"""The pools of a stage as planned: model, engine settings and memory per worker."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from medgpt.cluster.capacity import Demands, pool_demands, worker_demands
from medgpt.config.base import ConfigError
from medgpt.config.dpo import DPOConfig
from medgpt.config.model import LoraConfig, ModelConfig
from medgpt.config.pools import (
    Precision,
    RoleConfig,
    ScoringRoleConfig,
    TrainedRoleConfig,
)
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.reward_model import RewardModelConfig
from medgpt.config.stages import PretrainConfig, TrainStageConfig
from medgpt.config.train import EngineConfig
from medgpt.models.load import compute_dtype
from medgpt.models.model_shapes import ModelShape, model_shape
from medgpt.planning import activations
from medgpt.planning.activations import MicroBatch
from medgpt.planning.memory import (
    CPU_RUNTIME_BYTES,
    CUDA_CONTEXT_BYTES,
    FP32,
    MIB,
    StepPhase,
    TrainingSetup,
    WorkerMemory,
    train_memory,
)

PlannableConfig = TrainStageConfig | PPOStageConfig
TRAIN_POOL = "train"  # name of the only pool of a supervised stage


@dataclass(frozen=True, kw_only=True)
class PlannedPool:
    """A pool of identical workers."""

    name: str
    role: RoleConfig
    """Resources per worker; for a supervised stage derived from `cluster`."""
    model: ModelShape
    bytes_per_weight: int
    """Bytes per weight: 2 for bf16, 4 for fp32."""
    max_length: int
    """Tokens of the longest sequence."""
    memory: WorkerMemory
    """Peak memory of a worker."""
    is_trained: bool
    zero_stage: int
    """ZeRO stage; 0: every worker holds the whole model."""
    activation_checkpointing: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.role.gpus_per_worker > 0


def plan_pools(config: PlannableConfig) -> tuple[list[PlannedPool], list[str]]:
    """Return the pools of a stage and a note for each assumption.

    Raises:
        ConfigError: the configuration of a model cannot be found.
    """
    if isinstance(config, PPOStageConfig):
        return _ppo_pools(config)
    return [_train_pool(config)], []


def stage_demands(config: PlannableConfig) -> Demands:
    """Return the workers that must be placed at the same time."""
    if isinstance(config, PPOStageConfig):
        return pool_demands(config.pools.active_roles())
    return worker_demands(config.cluster)


def precision_bytes(precision: Precision, on_gpu: bool) -> int:
    """Return the bytes of a number."""
    return compute_dtype(precision, "cuda" if on_gpu else "cpu").itemsize


# ---- supervised stages ----


def _train_pool(config: TrainStageConfig) -> PlannedPool:
    engine = config.engine
    [role] = worker_demands(config.cluster).values()
    tokens = config.train.micro_batch_size * config.data.max_length
    label_share = 1.0
    if isinstance(config, PretrainConfig) and config.objective.kind == "mlm":
        label_share = config.objective.mlm_probability
    is_dpo = isinstance(config, DPOConfig)
    if is_dpo:  # TRL computes the logits of both answers at once
        tokens *= 2
    batch = MicroBatch(
        num_tokens=tokens,
        num_labels=round(label_share * tokens),
        loss_chunk_tokens=tokens if is_dpo else engine.loss_chunk_tokens,
        activation_checkpointing=engine.activation_checkpointing,
    )
    model, length = _trained_model_shape(config), config.data.max_length
    pool = _trained_pool(TRAIN_POOL, role, engine, model, batch, length)
    if is_dpo:  # the reference model, beside the trained one
        reference = {"reference": float(pool.bytes_per_weight * model.num_params)}
        phase = pool.memory.worst_phase
        phase = replace(phase, bytes_by_kind={**phase.bytes_by_kind, **reference})
        return replace(pool, memory=replace(pool.memory, worst_phase=phase))
    return pool


def _trained_pool(
    name: str,
    role: RoleConfig,
    engine: EngineConfig,
    model: ModelShape,
    batch: MicroBatch,
    max_length: int,
) -> PlannedPool:
    on_gpu = role.gpus_per_worker > 0
    b = precision_bytes(engine.precision, on_gpu)
    zero_stage = 1 if engine.zero_stage == 0 and b == 2 else engine.zero_stage  # as in the engine
    setup = TrainingSetup(
        zero_stage=zero_stage,
        num_ranks=role.num_workers,
        bytes_per_weight=b,
        micro_batch=batch,
        offload_optimizer=engine.offload_optimizer,
        on_gpu=on_gpu,
        is_saving_checkpoint=True,
    )
    return PlannedPool(
        name=name,
        role=role,
        model=model,
        bytes_per_weight=b,
        max_length=max_length,
        memory=train_memory(model, setup),
        is_trained=True,
        zero_stage=zero_stage,
        activation_checkpointing=engine.activation_checkpointing,
    )


def _trained_model_shape(config: TrainStageConfig) -> ModelShape:
    if isinstance(config, RewardModelConfig):
        return model_shape(config.model, "value")
    kind = config.objective.kind if isinstance(config, PretrainConfig) else "clm"
    tokenizer = config.tokenizer
    num_new_tokens = tokenizer.new_tokens if tokenizer.mode == "extend" else 0
    return model_shape(
        config.model, kind, vocab_size=tokenizer.vocab_size, new_tokens=num_new_tokens
    )


# ---- PPO ----


def _ppo_pools(config: PPOStageConfig) -> tuple[list[PlannedPool], list[str]]:
    pools, notes = config.pools, []
    policy = model_shape(config.model, "clm")
    whole_policy = policy
    if config.model.lora.rank:
        without_lora = config.model.model_copy(update={"lora": LoraConfig()})
        whole_policy = model_shape(without_lora, "clm")
    critic_name = config.critic.model or config.reward.model or config.model.name
    critic = _value_model_shape(critic_name, config, notes, lora=True)
    length = config.data.max_length + config.rollout.max_new_tokens
    tokens = max(config.ppo.micro_batch_tokens, length)
    planned = [
        _learning_pool("actor", pools.actor, policy, tokens, length),
        _learning_pool("critic", pools.critic, critic, tokens, length),
        _scoring_pool("reward", pools.reward, _reward_model_shape(config, notes), tokens, length),
        _rollout_pool(config, whole_policy, length),
    ]
    if not pools.reference_in_actor:
        reference = _scoring_pool("reference", pools.reference, whole_policy, tokens, length)
        planned.append(reference)
    return planned, notes


def _reward_model_shape(config: PPOStageConfig, notes: list[str]) -> ModelShape | None:
    """Return the shape of the reward model; None if rewards come from rules and functions alone."""
    if config.reward.model is None or not config.reward.score_weight:
        return None
    return _value_model_shape(config.reward.model, config, notes, lora=False)


def _value_model_shape(
    name: str | None, config: PPOStageConfig, notes: list[str], *, lora: bool
) -> ModelShape:
    """Return the shape of a value model; of one that does not exist yet, that of the policy."""
    assert name is not None
    adapters = {"lora": config.critic.lora} if lora else {}
    if name != config.model.name and Path(name).is_absolute() and not Path(name).exists():
        note = f"{name} is not there yet; taken to be as large as model.name"
        if note not in notes:
            notes.append(note)
        name = config.model.name
    return model_shape(ModelConfig.model_validate({"name": name, **adapters}), "value")


def _learning_pool(
    name: str, role: TrainedRoleConfig, model: ModelShape, tokens: int, length: int
) -> PlannedPool:
    engine = role.engine
    batch = MicroBatch(
        num_tokens=tokens,
        num_labels=tokens if model.vocab_size > 1 else 0,
        loss_chunk_tokens=engine.loss_chunk_tokens,
        activation_checkpointing=engine.activation_checkpointing,
    )
    return _trained_pool(name, role, engine, model, batch, length)


def _scoring_pool(
    name: str, role: ScoringRoleConfig, model: ModelShape | None, tokens: int, length: int
) -> PlannedPool:
    """Plan the pool of a frozen model. At ZeRO-3 its weights are partitioned and, while it runs,
    gathered up to DeepSpeed's limit. Raise ConfigError without a model: rules need no plan."""
    if model is None:
        raise ConfigError("reward.model is unset: plan a PPO with a reward model")
    b = precision_bytes(role.precision, role.gpus_per_worker > 0)
    chunk = min(tokens, EngineConfig().loss_chunk_tokens)
    bytes_by_kind = {
        "weights": b * model.num_params / (role.num_workers if role.zero_stage else 1),
        "activations": float(activations.forward_buffers(model, tokens, b)),
        "logits": float(b * chunk * model.vocab_size) if model.vocab_size > 1 else 0.0,
    }
    if role.zero_stage:
        bytes_by_kind["buckets"] = float(b * min(model.num_params, 2 * 10**9))
    return _inference_pool(name, role, model, bytes_by_kind, length, b, role.zero_stage)


def _rollout_pool(config: PPOStageConfig, model: ModelShape, length: int) -> PlannedPool:
    """Plan the rollout pool: the whole model, the KV cache of a batch, the widest activations of
    the prefill, the logits to sample from, and the buffers of weight sync."""
    role = config.pools.rollout
    b = precision_bytes(role.precision, role.gpus_per_worker > 0)
    budget = max(config.rollout.batch_tokens, length)
    rows = max(1, budget // length)
    embedding = b * model.num_embedding
    bytes_by_kind = {
        "weights": float(b * model.num_params),
        "cache": float(activations.kv_cache_bytes(model, budget, b)),
        "activations": float(activations.forward_buffers(model, rows * config.data.max_length, b)),
        "logits": float(rows * model.vocab_size * (b + 2 * FP32)),
        "buckets": float(2 * config.pools.sync.bucket_mb * MIB + embedding),
    }
    return _inference_pool("rollout", role, model, bytes_by_kind, length, b, 0)


def _inference_pool(
    name: str,
    role: RoleConfig,
    model: ModelShape,
    bytes_by_kind: Mapping[str, float],
    max_length: int,
    b: int,
    zero_stage: int,
) -> PlannedPool:
    """Return a pool that does not train; its GPU workers load weights via the host."""
    on_gpu = role.gpus_per_worker > 0
    runtime = CUDA_CONTEXT_BYTES if on_gpu else CPU_RUNTIME_BYTES
    phase = StepPhase(name="forward", bytes_by_kind={**bytes_by_kind, "runtime": runtime})
    host_bytes = b * model.num_params if on_gpu else 0.0
    return PlannedPool(
        name=name,
        role=role,
        model=model,
        bytes_per_weight=b,
        max_length=max_length,
        memory=WorkerMemory(worst_phase=phase, host_bytes=host_bytes),
        is_trained=False,
        zero_stage=zero_stage,
    )

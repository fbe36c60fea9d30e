"""The pools of a stage as planned: model, engine settings and memory per worker."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from medgpt.cluster.capacity import Demands, pool_demands, worker_demands
from medgpt.config.base import ConfigError
from medgpt.config.dpo import DPOConfig
from medgpt.config.model import ModelConfig
from medgpt.config.pools import (
    ROLES,
    RoleConfig,
    RolloutRoleConfig,
    ScoringRoleConfig,
    TrainedRoleConfig,
)
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.reward_model import RewardModelConfig
from medgpt.config.stages import PretrainConfig, TrainStageConfig
from medgpt.config.train import EngineConfig
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
    if not isinstance(config, PPOStageConfig):
        return worker_demands(config.cluster)
    pools = config.pools
    roles = {n: pools.role(n) for n in ROLES if n != "reference" or not pools.reference_in_actor}
    return pool_demands(roles)


def precision_bytes(precision: str, on_gpu: bool) -> int:
    """Return the bytes of a number; see engine.setup.compute_dtype."""
    auto = "bf16" if on_gpu else "fp32"
    return {"bf16": 2, "fp32": 4}[auto if precision == "auto" else precision]


# ---- supervised stages ----


def _train_pool(config: TrainStageConfig) -> PlannedPool:
    cluster, engine = config.cluster, config.engine
    [role] = worker_demands(cluster).values()
    model = _trained_model_shape(config)
    tokens = config.train.micro_batch_size * config.data.max_length
    if isinstance(config, DPOConfig):  # TRL computes the logits of both answers at once
        tokens *= 2
    label_share = 1.0
    if isinstance(config, PretrainConfig) and config.objective.kind == "mlm":
        label_share = config.objective.mlm_probability
    batch = MicroBatch(
        num_tokens=tokens,
        num_labels=round(label_share * tokens),
        loss_chunk_tokens=tokens if isinstance(config, DPOConfig) else engine.loss_chunk_tokens,
        activation_checkpointing=engine.activation_checkpointing,
    )
    setup = _training_setup(engine, role, batch)
    memory = train_memory(model, setup)
    if isinstance(config, DPOConfig):  # the reference model, beside the trained one
        memory = _add_to_device(
            memory, {"reference": float(setup.bytes_per_weight * model.num_params)}
        )
    return PlannedPool(
        name=TRAIN_POOL,
        role=role,
        model=model,
        bytes_per_weight=setup.bytes_per_weight,
        max_length=config.data.max_length,
        memory=memory,
        is_trained=True,
        zero_stage=setup.zero_stage,
        activation_checkpointing=engine.activation_checkpointing,
    )


def _training_setup(engine: EngineConfig, role: RoleConfig, batch: MicroBatch) -> TrainingSetup:
    on_gpu = role.gpus_per_worker > 0
    b = precision_bytes(engine.precision, on_gpu)
    stage = 1 if engine.zero_stage == 0 and b == 2 else engine.zero_stage  # as in the engine
    return TrainingSetup(
        zero_stage=stage,
        num_ranks=role.num_workers,
        bytes_per_weight=b,
        micro_batch=batch,
        offload_optimizer=engine.offload_optimizer,
        on_gpu=on_gpu,
        is_saving_checkpoint=True,
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
    policy_without_lora = (
        policy if not config.model.lora.rank else model_shape(_without_lora(config.model), "clm")
    )
    critic_name = config.critic.model or config.reward.model or config.model.name
    critic = _value_model_shape(critic_name, config, notes, lora=True)
    length = config.data.max_length + config.rollout.max_new_tokens
    tokens = max(config.ppo.micro_batch_tokens, length)
    planned = [
        _trained_pool("actor", pools.actor, policy, tokens, length),
        _trained_pool("critic", pools.critic, critic, tokens, length),
        _scoring_pool("reward", pools.reward, _reward_model_shape(config, notes), tokens, length),
        _rollout_pool(config, policy_without_lora, length),
    ]
    if not pools.reference_in_actor:
        planned.append(
            _scoring_pool("reference", pools.reference, policy_without_lora, tokens, length)
        )
    return planned, notes


def _without_lora(model: ModelConfig) -> ModelConfig:
    return ModelConfig(name=model.name, trust_remote_code=model.trust_remote_code)


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


def _trained_pool(
    name: str, role: TrainedRoleConfig, model: ModelShape, tokens: int, length: int
) -> PlannedPool:
    engine = role.engine
    batch = MicroBatch(
        num_tokens=tokens,
        num_labels=tokens if model.vocab_size > 1 else 0,
        loss_chunk_tokens=engine.loss_chunk_tokens,
        activation_checkpointing=engine.activation_checkpointing,
    )
    setup = _training_setup(engine, role, batch)
    return PlannedPool(
        name=name,
        role=role,
        model=model,
        bytes_per_weight=setup.bytes_per_weight,
        max_length=length,
        memory=train_memory(model, setup),
        is_trained=True,
        zero_stage=setup.zero_stage,
        activation_checkpointing=engine.activation_checkpointing,
    )


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
    return PlannedPool(
        name=name,
        role=role,
        model=model,
        bytes_per_weight=b,
        max_length=length,
        memory=_inference_memory(bytes_by_kind, role, b * model.num_params),
        is_trained=False,
        zero_stage=role.zero_stage,
    )


def _rollout_pool(config: PPOStageConfig, model: ModelShape, length: int) -> PlannedPool:
    """Plan the rollout pool: the whole model, the KV cache of a batch, the widest activations of
    the prefill, the logits to sample from, and the buffers of weight sync."""
    role: RolloutRoleConfig = config.pools.rollout
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
    return PlannedPool(
        name="rollout",
        role=role,
        model=model,
        bytes_per_weight=b,
        max_length=length,
        memory=_inference_memory(bytes_by_kind, role, b * model.num_params),
        is_trained=False,
        zero_stage=0,
    )


def _inference_memory(
    bytes_by_kind: Mapping[str, float], role: RoleConfig, weights: float
) -> WorkerMemory:
    """Return the memory of a worker that does not train; GPU workers load weights via the host."""
    on_gpu = role.gpus_per_worker > 0
    runtime = CUDA_CONTEXT_BYTES if on_gpu else CPU_RUNTIME_BYTES
    phase = StepPhase(name="forward", bytes_by_kind={**bytes_by_kind, "runtime": runtime})
    return WorkerMemory(worst_phase=phase, host_bytes=weights if on_gpu else 0.0)


def _add_to_device(memory: WorkerMemory, extra: Mapping[str, float]) -> WorkerMemory:
    phase = StepPhase(
        name=memory.worst_phase.name, bytes_by_kind={**memory.worst_phase.bytes_by_kind, **extra}
    )
    return WorkerMemory(worst_phase=phase, host_bytes=memory.host_bytes)

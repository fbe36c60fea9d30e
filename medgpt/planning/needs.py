"""What each pool of a stage holds: its model, how it runs, and the memory of one of its workers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from medgpt.cluster.capacity import Claims, of_pools, of_workers
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
from medgpt.config.reward_model import RewardConfig
from medgpt.config.stages import PretrainConfig, TrainStageConfig
from medgpt.config.train import EngineConfig
from medgpt.models.model_shapes import Outline, outline
from medgpt.planning import activations
from medgpt.planning.activations import Batch
from medgpt.planning.memory import (
    CONTEXT_BYTES,
    FP32,
    MIB,
    RUNTIME_BYTES,
    Memory,
    Phase,
    Training,
    train_memory,
)

StageConfig = TrainStageConfig | PPOStageConfig
TRAIN = "train"  # the one pool of a supervised stage


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Workers that are alike."""

    name: str
    role: RoleConfig
    """What each reserves; of a supervised stage made from `cluster`."""
    model: Outline
    b: int
    """Bytes of a weight."""
    length: int
    """Tokens of the longest piece."""
    memory: Memory
    """Of a worker."""
    trains: bool
    stage: int
    """ZeRO, 0 for a whole model on every worker."""
    checkpointing: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.role.gpus_per_worker > 0


def pools_of(config: StageConfig) -> tuple[list[Pool], list[str]]:
    """The pools of a stage, and what had to be assumed.

    Raises:
        ConfigError: a model's configuration cannot be found.
    """
    if isinstance(config, PPOStageConfig):
        return _ppo_pools(config)
    return [_train_pool(config)], []


def claims_of(config: StageConfig) -> Claims:
    """Workers that must be there at the same time."""
    if not isinstance(config, PPOStageConfig):
        return of_workers(config.cluster)
    pools = config.pools
    roles = {n: pools.role(n) for n in ROLES if n != "reference" or not pools.reference_in_actor}
    return of_pools(roles)


def bytes_of(precision: str, on_gpu: bool) -> int:
    """Bytes of a number; see engine.setup.compute_dtype."""
    auto = "bf16" if on_gpu else "fp32"
    return {"bf16": 2, "fp32": 4}[auto if precision == "auto" else precision]


# ---- supervised stages ----


def _train_pool(config: TrainStageConfig) -> Pool:
    cluster, engine = config.cluster, config.engine
    [role] = of_workers(cluster).values()
    model = _trained_outline(config)
    tokens = config.train.micro_batch_size * config.data.max_length
    if isinstance(config, DPOConfig):  # TRL: a chosen and a rejected answer, all logits at once
        tokens *= 2
    share = 1.0
    if isinstance(config, PretrainConfig) and config.objective.kind == "mlm":
        share = config.objective.mlm_probability
    batch = Batch(
        tokens=tokens,
        labels=round(share * tokens),
        chunk=tokens if isinstance(config, DPOConfig) else engine.loss_chunk_tokens,
        checkpointing=engine.activation_checkpointing,
    )
    setting = _training(engine, role, batch)
    memory = train_memory(model, setting)
    if isinstance(config, DPOConfig):  # the model that it starts from, beside it
        memory = _with(memory, {"reference": float(setting.b * model.num_params)})
    return Pool(
        name=TRAIN,
        role=role,
        model=model,
        b=setting.b,
        length=config.data.max_length,
        memory=memory,
        trains=True,
        stage=setting.zero_stage,
        checkpointing=engine.activation_checkpointing,
    )


def _training(engine: EngineConfig, role: RoleConfig, batch: Batch) -> Training:
    on_gpu = role.gpus_per_worker > 0
    b = bytes_of(engine.precision, on_gpu)
    stage = 1 if engine.zero_stage == 0 and b == 2 else engine.zero_stage  # as the engine does
    return Training(
        zero_stage=stage,
        num_ranks=role.num_workers,
        b=b,
        batch=batch,
        offload=engine.offload_optimizer,
        on_gpu=on_gpu,
        snapshot=True,
    )


def _trained_outline(config: TrainStageConfig) -> Outline:
    if isinstance(config, RewardConfig):
        return outline(config.model, "value")
    kind = config.objective.kind if isinstance(config, PretrainConfig) else "clm"
    tokenizer = config.tokenizer
    new = tokenizer.new_tokens if tokenizer.mode == "extend" else 0
    return outline(config.model, kind, vocab_size=tokenizer.vocab_size, new_tokens=new)


# ---- PPO ----


def _ppo_pools(config: PPOStageConfig) -> tuple[list[Pool], list[str]]:
    pools, notes = config.pools, []
    policy = outline(config.model, "clm")
    plain = policy if not config.model.lora.rank else outline(_plain(config.model), "clm")
    critic_name = config.critic.model or config.reward.model or config.model.name
    critic = _value_outline(critic_name, config, notes, lora=True)
    length = config.data.max_length + config.rollout.max_new_tokens
    tokens = max(config.ppo.micro_batch_tokens, length)
    found = [
        _learner("actor", pools.actor, policy, tokens, length),
        _learner("critic", pools.critic, critic, tokens, length),
        _scorer("reward", pools.reward, _reward_outline(config, notes), tokens, length),
        _rollout(config, plain, length),
    ]
    if not pools.reference_in_actor:
        found.append(_scorer("reference", pools.reference, plain, tokens, length))
    return found, notes


def _plain(model: ModelConfig) -> ModelConfig:
    return ModelConfig(name=model.name, trust_remote_code=model.trust_remote_code)


def _reward_outline(config: PPOStageConfig, notes: list[str]) -> Outline | None:
    """None: rewards come from rules and functions alone."""
    if config.reward.model is None or not config.reward.score_weight:
        return None
    return _value_outline(config.reward.model, config, notes, lora=False)


def _value_outline(
    name: str | None, config: PPOStageConfig, notes: list[str], *, lora: bool
) -> Outline:
    """Of a reward model that is still to be trained, that of the policy's model."""
    assert name is not None
    adapters = {"lora": config.critic.lora} if lora else {}
    if name != config.model.name and Path(name).is_absolute() and not Path(name).exists():
        note = f"{name} is not there yet; taken to be as large as model.name"
        if note not in notes:
            notes.append(note)
        name = config.model.name
    return outline(ModelConfig.model_validate({"name": name, **adapters}), "value")


def _learner(name: str, role: TrainedRoleConfig, model: Outline, tokens: int, length: int) -> Pool:
    engine = role.engine
    batch = Batch(
        tokens=tokens,
        labels=tokens if model.vocab > 1 else 0,
        chunk=engine.loss_chunk_tokens,
        checkpointing=engine.activation_checkpointing,
    )
    setting = _training(engine, role, batch)
    return Pool(
        name=name,
        role=role,
        model=model,
        b=setting.b,
        length=length,
        memory=train_memory(model, setting),
        trains=True,
        stage=setting.zero_stage,
        checkpointing=engine.activation_checkpointing,
    )


def _scorer(
    name: str, role: ScoringRoleConfig, model: Outline | None, tokens: int, length: int
) -> Pool:
    """A frozen model; at ZeRO-3 its weights are partitioned, and whole while it runs up to what
    DeepSpeed keeps gathered. Without a model the pool computes rewards by rules."""
    if model is None:
        raise ConfigError("reward.model is unset: plan a PPO with a reward model")
    b = bytes_of(role.precision, role.gpus_per_worker > 0)
    chunk = min(tokens, EngineConfig().loss_chunk_tokens)
    held = {
        "weights": b * model.num_params / (role.num_workers if role.zero_stage else 1),
        "activations": float(activations.forward_work(model, tokens, b)),
        "logits": float(b * chunk * model.vocab) if model.vocab > 1 else 0.0,
    }
    if role.zero_stage:
        held["buckets"] = float(b * min(model.num_params, 2 * 10**9))
    return Pool(
        name=name,
        role=role,
        model=model,
        b=b,
        length=length,
        memory=_running(held, role, b * model.num_params),
        trains=False,
        stage=role.zero_stage,
    )


def _rollout(config: PPOStageConfig, model: Outline, length: int) -> Pool:
    """A whole model, keys and values of a batch, the widest place of reading its prompts, what its
    last tokens are drawn from, and the buffers of weight sync."""
    role: RolloutRoleConfig = config.pools.rollout
    b = bytes_of(role.precision, role.gpus_per_worker > 0)
    budget = max(config.rollout.batch_tokens, length)
    rows = max(1, budget // length)
    embedding = b * model.embedding
    held = {
        "weights": float(b * model.num_params),
        "cache": float(activations.cache(model, budget, b)),
        "activations": float(activations.forward_work(model, rows * config.data.max_length, b)),
        "logits": float(rows * model.vocab * (b + 2 * FP32)),
        "buckets": float(2 * config.pools.sync.bucket_mb * MIB + embedding),
    }
    return Pool(
        name="rollout",
        role=role,
        model=model,
        b=b,
        length=length,
        memory=_running(held, role, b * model.num_params),
        trains=False,
        stage=0,
    )


def _running(held: Mapping[str, float], role: RoleConfig, weights: float) -> Memory:
    """Of a worker that does not train; the host of a GPU holds the weights while they are read."""
    on_gpu = role.gpus_per_worker > 0
    runtime = CONTEXT_BYTES if on_gpu else RUNTIME_BYTES
    phase = Phase(name="forward", held={**held, "runtime": runtime})
    return Memory(device=phase, host=weights if on_gpu else 0.0)


def _with(memory: Memory, more: Mapping[str, float]) -> Memory:
    phase = Phase(name=memory.device.name, held={**memory.device.held, **more})
    return Memory(device=phase, host=memory.host)

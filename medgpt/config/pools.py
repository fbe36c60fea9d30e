"""Who works where: the pools of PPO, one for each role."""

from typing import Annotated, Literal, Self, get_args

from annotated_types import Ge, Gt
from pydantic import Field, model_validator

from medgpt.config.base import Config, Count
from medgpt.config.train import EngineConfig

RoleName = Literal["actor", "critic", "reward", "reference", "rollout"]
ROLES: tuple[RoleName, ...] = get_args(RoleName)
Precision = Literal["auto", "fp32", "bf16"]


class RoleConfig(Config):
    """One pool: its workers, what each reserves, and how its model is kept."""

    num_workers: Count = 1
    """Processes, each one rank of the role."""
    cpus_per_worker: Annotated[float, Gt(0)] = 1
    """CPUs each reserves; its number of threads follows. May be a fraction."""
    gpus_per_worker: Annotated[float, Ge(0)] = 0
    """GPUs each reserves; 0 runs the role on the CPU."""
    resources: dict[str, Annotated[float, Gt(0)]] = Field(default={})
    """Ray's custom resources each reserves: `{ "node-a" = 1 }`."""
    labels: dict[str, str] = Field(default={})
    """Node labels that each needs, in Ray's words: `{ "ray.io/accelerator-type" = "H100" }`."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Workers on few nodes or on many; STRICT_ forbids anything else."""
    share_with: RoleName | None = None
    """Work on the bundles of this role's pool, in turns, instead of on own ones."""
    offload: bool = False
    """Keep the weights in host memory while the role is idle; not where it trains, zero_stage is 3
    or vLLM generates. Needed where roles share a GPU."""


class TrainedRoleConfig(RoleConfig):
    """A pool that trains its model."""

    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _check_optimizer(self) -> Self:
        if self.engine.offload_optimizer and self.engine.zero_stage == 0:
            raise ValueError(
                "engine.offload_optimizer=true needs engine.zero_stage 1, 2 or 3, not 0"
            )
        return self


class RolloutRoleConfig(RoleConfig):
    """The pool that generates; every worker has a whole model."""

    precision: Precision = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""


class ScoringRoleConfig(RoleConfig):
    """A pool whose model stays as it is."""

    precision: Precision = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    zero_stage: Literal[0, 3] = 0
    """DeepSpeed ZeRO: 0 a whole model on every worker, 3 the weights are partitioned."""


class SyncConfig(Config):
    """How weights go from the actor to the rollout workers."""

    transport: Literal["auto", "nccl", "gloo", "object_store"] = "auto"
    """auto: nccl where all have GPUs of their own, else gloo; Ray's object store where the
    pools cannot reach each other. The others: that or an error."""
    bucket_mb: Count = 32
    """MiB that travel together; a larger weight travels alone."""
    timeout_s: Annotated[float, Gt(0)] = 300
    """Longest wait for the other side of a transfer."""


class PoolsConfig(Config):
    """Each role has its own pool; all are placed together or not at all."""

    actor: TrainedRoleConfig = TrainedRoleConfig()
    critic: TrainedRoleConfig = TrainedRoleConfig()
    reward: ScoringRoleConfig = ScoringRoleConfig()
    reference: ScoringRoleConfig = ScoringRoleConfig()
    rollout: RolloutRoleConfig = RolloutRoleConfig()
    reference_in_actor: bool = False
    """With LoRA: the actor's base with the adapter off is the reference, which has no pool then."""
    sync: SyncConfig = SyncConfig()
    call_timeout_s: Annotated[float, Gt(0)] = 1800
    """Longest time that one call to a pool may take; then its workers count as dead."""
    join_timeout_s: Annotated[float, Gt(0)] = 300
    """Longest time in which the workers of a pool must have started and found each other."""

    def role(self, name: RoleName) -> RoleConfig:
        roles: dict[RoleName, RoleConfig] = {
            "actor": self.actor,
            "critic": self.critic,
            "reward": self.reward,
            "reference": self.reference,
            "rollout": self.rollout,
        }
        return roles[name]

    @model_validator(mode="after")
    def _check_offload(self) -> Self:
        for name in ROLES:
            role = self.role(name)
            trains = isinstance(role, TrainedRoleConfig)
            partitioned = isinstance(role, ScoringRoleConfig) and role.zero_stage == 3
            if role.offload and (trains or partitioned):
                raise ValueError(
                    f"pools.{name}.offload=true: only a whole model that does not train can leave "
                    f"the GPU; set it to false{'' if trains else ', or zero_stage to 0'}"
                )
        return self

    @model_validator(mode="after")
    def _check_sharing(self) -> Self:
        for name in ROLES:
            guest = self.role(name)
            if guest.share_with is None:
                continue
            key = f"pools.{name}.share_with={guest.share_with}"
            if guest.share_with == "reference" and self.reference_in_actor:
                raise ValueError(
                    f"{key}: it has no pool with reference_in_actor=true; name another"
                )
            host = self.role(guest.share_with)
            if guest.share_with == name or host.share_with is not None:
                raise ValueError(f"{key}: name a pool that has bundles of its own")
            for knob in ("num_workers", "cpus_per_worker", "gpus_per_worker"):
                if getattr(guest, knob) != getattr(host, knob):
                    raise ValueError(
                        f"{key}: pools.{name}.{knob}={getattr(guest, knob)} must equal "
                        f"pools.{guest.share_with}.{knob}={getattr(host, knob)}"
                    )
            if guest.gpus_per_worker and not (guest.offload and host.offload):
                raise ValueError(
                    f"{key}: roles take turns on a GPU; set pools.{name}.offload=true and "
                    f"pools.{guest.share_with}.offload=true"
                )
        return self

"""Sections of the PPO pools: workers, resources and placement of each role."""

from typing import Annotated, Literal, Self, get_args

from annotated_types import Ge, Gt
from pydantic import Field, model_validator

from medgpt.config.base import Config, Count
from medgpt.config.train import EngineConfig

RoleName = Literal["actor", "critic", "reward", "reference", "rollout"]
ROLES: tuple[RoleName, ...] = get_args(RoleName)
Precision = Literal["auto", "fp32", "bf16"]


class RoleConfig(Config):
    """A pool: its workers, the resources of each, and where its weights are kept."""

    num_workers: Count = 1
    """Number of processes, each one rank of the role."""
    cpus_per_worker: Annotated[float, Gt(0)] = 1
    """CPUs reserved for each worker, which also set its number of threads. May be a fraction."""
    gpus_per_worker: Annotated[float, Ge(0)] = 0
    """GPUs reserved for each worker; 0 runs the role on the CPU."""
    resources: dict[str, Annotated[float, Gt(0)]] = Field(default={})
    """Custom Ray resources reserved for each worker: `{ "node-a" = 1 }`."""
    labels: dict[str, str] = Field(default={})
    """Ray node labels that each worker requires: `{ "ray.io/accelerator-type" = "H100" }`."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Place the workers on few nodes (PACK) or on many (SPREAD); STRICT_ forbids anything else."""
    share_with: RoleName | None = None
    """Colocate with this role: share its bundles and take turns."""
    offload: bool = False
    """Keep the weights in host memory while the role is idle. Required where roles share a GPU; not
    available if the role trains, zero_stage is 3 or vLLM generates."""


class TrainedRoleConfig(RoleConfig):
    """A pool that trains its model."""

    engine: EngineConfig = EngineConfig()


class RolloutRoleConfig(RoleConfig):
    """The pool that generates; every worker holds a whole model."""

    precision: Precision = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""


class ScoringRoleConfig(RoleConfig):
    """A pool whose model is not trained."""

    precision: Precision = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    zero_stage: Literal[0, 3] = 0
    """DeepSpeed ZeRO stage: 0 keeps a whole model on every worker, 3 partitions the weights."""


class SyncConfig(Config):
    """How weights are sent from the actor to the rollout workers."""

    transport: Literal["auto", "nccl", "gloo", "object_store"] = "auto"
    """auto: nccl if every worker has its own GPU, else gloo, or Ray's object store if the pools
    cannot connect. Any other value: that transport or an error."""
    bucket_mb: Count = 32
    """MiB sent together; a larger weight is sent alone."""
    timeout_s: Annotated[float, Gt(0)] = 300
    """Maximum seconds to wait for the other side of a transfer."""


class PoolsConfig(Config):
    """One pool for each role; all are placed together or not at all."""

    actor: TrainedRoleConfig = TrainedRoleConfig()
    critic: TrainedRoleConfig = TrainedRoleConfig()
    reward: ScoringRoleConfig = ScoringRoleConfig()
    reference: ScoringRoleConfig = ScoringRoleConfig()
    rollout: RolloutRoleConfig = RolloutRoleConfig()
    reference_in_actor: bool = False
    """With LoRA: the actor with its adapter disabled is the reference, which then has no pool."""
    sync: SyncConfig = SyncConfig()
    call_timeout_s: Annotated[float, Gt(0)] = 1800
    """Maximum seconds of a call to a pool; then its workers count as dead."""
    join_timeout_s: Annotated[float, Gt(0)] = 300
    """Maximum seconds until the workers of a pool have started and connected to each other."""

    def role(self, name: RoleName) -> RoleConfig:
        """Return the pool config of a role."""
        return getattr(self, name)

    def active_roles(self) -> dict[str, RoleConfig]:
        """Return the configs of the roles that have a pool, by name."""
        absent = ["reference"] if self.reference_in_actor else []
        return {name: self.role(name) for name in ROLES if name not in absent}

    @model_validator(mode="after")
    def _check_offload(self) -> Self:
        for name in ROLES:
            role = self.role(name)
            trains = isinstance(role, TrainedRoleConfig)
            partitioned = isinstance(role, ScoringRoleConfig) and role.zero_stage == 3
            if role.offload and (trains or partitioned):
                raise ValueError(
                    f"pools.{name}.offload=true: only a whole model that is not trained can leave "
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
                    f"{key}: it has no pool with reference_in_actor=true; name another role"
                )
            host = self.role(guest.share_with)
            if guest.share_with == name or host.share_with is not None:
                raise ValueError(f"{key}: name a role that has bundles of its own")
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

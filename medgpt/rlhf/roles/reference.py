"""The reference role: the policy before PPO, frozen."""

from typing import Any

from medgpt.config.model import ModelConfig
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.train import EngineConfig
from medgpt.models.load import build_model, compute_dtype
from medgpt.models.policy import Policy
from medgpt.rlhf.roles.common import (
    FrozenRole,
    initial_device,
    max_pass_tokens,
    response_logprobs,
    role_device,
)
from medgpt.rlhf.rollout_batch import Logprobs, Sequences, join_sequences


class Reference(FrozenRole):
    """One rank of the reference, independent of Ray."""

    def __init__(self, config: PPOStageConfig) -> None:
        self.config, self.device = config, role_device()
        is_partitioned = config.pools.reference.zero_stage > 0
        self.policy = self._load_partitioned() if is_partitioned else self._load_replicated()

    def logprobs(self, temperature: float, *rollouts: Sequences) -> Logprobs:
        """Return this rank's share of the log-probabilities at the sampling temperature. The caller
        passes the temperature because a pool may serve several runs."""
        sequences = join_sequences(rollouts)
        return response_logprobs(
            self.policy,
            sequences,
            self.config,
            self.device,
            temperature=temperature,
            padded=self.policy.is_padded,
        )

    def modules(self) -> list[Any]:
        return [self.policy]

    @property
    def _model_config(self) -> ModelConfig:
        assert self.config.model.name is not None
        return self.config.model.with_name(self.config.model.name)

    def _load_replicated(self) -> Any:
        model = build_model(
            self._model_config,
            head_kind="clm",
            seed=0,
            dtype=compute_dtype(self.config.pools.reference.precision, self.device.type),
            packing=self.config.data.packing,
        )
        policy = Policy(model, max_batch_tokens=max_pass_tokens(self.config))
        return policy.requires_grad_(False).eval().to(initial_device(self.config.pools.reference))

    def _load_partitioned(self) -> Any:
        """DeepSpeed is imported only where it is used: it takes seconds."""
        from medgpt.engine import FrozenEngine
        from medgpt.engine.build import build_policy

        pool = self.config.pools.reference
        engine = EngineConfig(zero_stage=pool.zero_stage, precision=pool.precision)
        max_tokens = max_pass_tokens(self.config)
        policy = build_policy(
            self._model_config,
            engine,
            self.device,
            seed=0,
            max_batch_tokens=max_tokens,
            packing=self.config.data.packing,
        )
        return FrozenEngine(policy, engine, self.device)

"""The reference role: the policy before PPO, frozen."""

from typing import Any

import torch

from medgpt.config.model import ModelConfig
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.train import EngineConfig
from medgpt.models.load import SpecialTokenIds, build_model
from medgpt.models.policy import Policy
from medgpt.rlhf.roles.common import (
    frozen_dtype,
    initial_device,
    max_pass_tokens,
    move_modules,
    response_logprobs,
    role_device,
)
from medgpt.rlhf.rollout_batch import Logprobs, Sequences, join_sequences


class Reference:
    """One rank of the reference, independent of Ray."""

    def __init__(self, config: PPOStageConfig) -> None:
        self.config, self.device = config, role_device()
        self.policy = (
            self._load_partitioned()
            if config.pools.reference.zero_stage
            else self._load_replicated()
        )

    def logprobs(self, temperature: float, *rollouts: Sequences) -> Logprobs:
        """Return this rank's share of the log-probabilities at the sampling temperature. The caller
        passes the temperature because a pool may serve several runs."""
        return response_logprobs(
            self.policy,
            join_sequences(rollouts),
            self.config,
            self.device,
            model="reference",
            temperature=temperature,
        )

    def offload(self) -> None:
        """Move the model to host memory; not supported at ZeRO-3."""
        move_modules([self.policy], torch.device("cpu"))

    def onload(self) -> None:
        move_modules([self.policy], self.device)

    @property
    def _model_config(self) -> ModelConfig:
        model = self.config.model
        return ModelConfig(
            name=model.name,
            attention=model.attention,
            trust_remote_code=model.trust_remote_code,
        )

    def _load_replicated(self) -> Any:
        model = build_model(
            self._model_config,
            head_kind="clm",
            vocab_size=0,  # 0: as saved
            special_ids=SpecialTokenIds(),
            seed=0,
            dtype=frozen_dtype(self.config.pools.reference.precision, self.device),
        )
        policy = Policy(model, max_batch_tokens=max_pass_tokens(self.config))
        return policy.requires_grad_(False).eval().to(initial_device(self.config.pools.reference))

    def _load_partitioned(self) -> Any:
        """DeepSpeed is imported only where it is used: it takes seconds."""
        from medgpt.engine.frozen import FrozenEngine
        from medgpt.engine.policy import build_policy

        pool = self.config.pools.reference
        engine = EngineConfig(zero_stage=pool.zero_stage, precision=pool.precision)
        policy = build_policy(
            self._model_config,
            engine,
            self.device,
            seed=0,
            max_batch_tokens=max_pass_tokens(self.config),
        )
        return FrozenEngine(policy, engine, self.device)

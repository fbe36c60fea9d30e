"""The reward role: rewards of responses from the reward model, rules and user-defined functions."""

from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from medgpt.config.ppo import PPOStageConfig
from medgpt.config.train import EngineConfig
from medgpt.data.loader.batch import PackedBatch
from medgpt.data.sources.records import prompt_from_json
from medgpt.models.answers import answer_text
from medgpt.models.load import compute_dtype
from medgpt.models.tokenizer import load_tokenizer
from medgpt.models.tokenizer_compat import check_same_token_ids
from medgpt.models.value_model import ValueModel, last_token_values, load_value_model
from medgpt.rlhf.batching import split_by_length
from medgpt.rlhf.rewards.reward_sample import RewardSample
from medgpt.rlhf.rewards.weighted_sum import RewardResult, WeightedRewards
from medgpt.rlhf.roles.common import (
    FrozenRole,
    errors_for_key,
    initial_device,
    local_forward_passes,
    role_device,
)
from medgpt.rlhf.rollout_batch import Prompts, Scores, Sequences, join_sequences


class Scorer(Protocol):
    """A value model, partitioned or not."""

    @property
    def is_padded(self) -> bool: ...

    def __call__(self, batch: PackedBatch) -> Tensor:
        """Return the values (1, N) of all positions."""
        ...


class Reward(FrozenRole):
    """One rank of the reward pool, independent of Ray."""

    def __init__(self, config: PPOStageConfig) -> None:
        assert config.model.name is not None
        self.config, self.device = config, role_device()
        self.pool = config.pools.reward
        self.tokenizer = load_tokenizer(config.model.name, config.model.trust_remote_code)
        self.rewards = WeightedRewards(config.reward)
        reward_model = config.reward.model if self.rewards.needs_scores else None
        self.model = self._load("reward.model", reward_model)
        judge = config.judge.model if config.judge.every else None
        self.judge_model = self._load("judge.model", judge)
        self.latest_batch: tuple[list[RewardSample], RewardResult] | None = None
        """Kept for the samples in the report."""

    @torch.no_grad()
    def score(self, prompts: Prompts, *rollouts: Sequences) -> Scores:
        """Return this rank's share of the rewards. An empty response has no model score."""
        sequences = join_sequences(rollouts)
        index, scores = self._model_scores(self.model, sequences)
        samples = [
            RewardSample(
                sample_id=sequences.sample_ids[i],
                **prompt_from_json(prompts.messages[i]),
                text=answer_text(
                    self.tokenizer,
                    sequences.prompts.row(i).tolist(),
                    sequences.responses.row(i).tolist(),
                    thinking_tokens=self.config.rollout.thinking_tokens,
                ),
                finished=bool(sequences.finished[i]),
            )
            for i in index
        ]
        rewards = self.rewards(samples, scores)
        self.latest_batch = samples, rewards
        totals = [np.nan if total is None else total for total in rewards.totals]
        return Scores(index=index, totals=np.array(totals, np.float32), rewards=rewards)

    @torch.no_grad()
    def judge_scores(self, *answers: Sequences) -> tuple[NDArray[np.int64], list[float]]:
        """Return the rows of this rank's share and the judge model's score of each."""
        index, scores = self._model_scores(self.judge_model, join_sequences(answers))
        assert scores is not None
        return index, scores

    def modules(self) -> list[ValueModel]:
        return [model for model in (self.model, self.judge_model) if isinstance(model, ValueModel)]

    def report_samples(self, num: int) -> list[dict[str, Any]]:
        """Return up to `num` samples of the latest call; none from a worker just restarted."""
        if self.latest_batch is None:
            return []
        samples, rewards = self.latest_batch
        return [
            {
                "prompt": samples[i].question,
                "answer": samples[i].text,
                "total": rewards.totals[i],
                "components": {name: xs[i] for name, xs in rewards.components.items()},
            }
            for i in range(min(num, len(samples)))
        ]

    def _model_scores(
        self, model: Scorer | None, sequences: Sequences
    ) -> tuple[NDArray[np.int64], list[float] | None]:
        """Return the rows of this rank's share and the model's scores, if there is a model."""
        if model is None:
            shares = split_by_length(sequences.lengths, dist.get_world_size())
            return shares[dist.get_rank()], None
        index, scores = [], []
        rows, padded = np.arange(len(sequences)), model.is_padded
        for forward in local_forward_passes(sequences, rows, self.config, padded=padded):
            batch = forward.batch.to(self.device)
            index.append(forward.rows)
            scores.append(last_token_values(model(batch), batch)[: len(forward.rows)])
        return np.concatenate(index), torch.cat(scores).tolist()

    def _load(self, key: str, name: str | None) -> Scorer | None:
        """Load a reward model. Raises ConfigError if it is none, or has another tokenizer than the
        actor."""
        if name is None:
            return None
        with errors_for_key(key):
            tokenizer_names = "the actor", f"{key}={name}"
            load = self._load_partitioned if self.pool.zero_stage else self._load_replicated
            model = load(name)
            tokenizer = load_tokenizer(name, self.config.model.trust_remote_code)
            check_same_token_ids(self.tokenizer, tokenizer, names=tokenizer_names)
        return model

    def _load_replicated(self, name: str) -> ValueModel:
        dtype = compute_dtype(self.pool.precision, self.device.type)
        model, _ = load_value_model(
            name, base=self.config.model, dtype=dtype, packing=self.config.data.packing
        )
        return model.to(initial_device(self.pool))

    def _load_partitioned(self, name: str) -> Scorer:
        """DeepSpeed is imported only where it is used: it takes seconds."""
        from medgpt.engine.build import load_partitioned_reward_model

        engine = EngineConfig(zero_stage=self.pool.zero_stage, precision=self.pool.precision)
        config, packing = self.config.model.with_name(name), self.config.data.packing
        return load_partitioned_reward_model(config, engine, self.device, packing=packing)

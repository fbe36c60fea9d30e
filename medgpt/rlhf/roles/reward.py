"""The reward role: what each response is worth, by the reward model, the rules and the user's
functions."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from medgpt.config.ppo import PPOStageConfig
from medgpt.config.train import EngineConfig
from medgpt.data.loader.batch import PackedBatch
from medgpt.data.sources.records import Message
from medgpt.models.tokenizer import load_base
from medgpt.models.tokenizer_compat import check_same_speech
from medgpt.models.value_model import ValueModel, last_values, load_value_model
from medgpt.rlhf.batching import share_by_length
from medgpt.rlhf.rewards.reward_sample import RewardSample
from medgpt.rlhf.rewards.total import Rewarded, Rewards
from medgpt.rlhf.roles.common import (
    errors_for_key,
    move,
    my_forwards,
    resting_device,
    role_device,
    role_dtype,
)
from medgpt.rlhf.rollout_batch import Prompts, Scores, Sequences, join_sequences

Scorer = Callable[[PackedBatch], Tensor]  # (1, N) values of the positions


class Reward:
    """One rank of the reward pool. Knows nothing about Ray."""

    def __init__(self, config: PPOStageConfig) -> None:
        assert config.model.name is not None
        self.config, self.device = config, role_device()
        self.pool = config.pools.reward
        self.tokenizer = load_base(config.model.name)
        self.rewards = Rewards(config.reward)
        needed = config.reward.model if self.rewards.needs_scores else None
        self.model = self._load("reward.model", needed)
        judge = config.judge.model if config.judge.every else None
        self.judging = self._load("judge.model", judge)
        self.latest: tuple[list[RewardSample], Rewarded] | None = None
        """For samples in the report."""

    @torch.no_grad()
    def score(self, prompts: Prompts, *rollouts: Sequences) -> Scores:
        """This rank's share. An empty response, or one whose component failed, has no score."""
        whole = join_sequences(rollouts)
        index, scores = self._model_scores(self.model, whole)
        answered = [
            RewardSample(
                sample_id=whole.sample_ids[i],
                messages=tuple(Message(*turn) for turn in json.loads(prompts.messages[i])),
                text=str(self.tokenizer.decode(whole.responses.row(i), skip_special_tokens=True)),
                finished=bool(whole.finished[i]),
            )
            for i in index
        ]
        rewarded = self.rewards(answered, scores)
        self.latest = answered, rewarded
        totals = [np.nan if total is None else total for total in rewarded.totals]
        return Scores(index=index, totals=np.array(totals, np.float32), rewarded=rewarded)

    @torch.no_grad()
    def judge(self, *answers: Sequences) -> tuple[NDArray[np.int64], list[float]]:
        """Rows of this rank's share, and the score of each by the judge's reward model."""
        index, scores = self._model_scores(self.judging, join_sequences(answers))
        assert scores is not None
        return index, scores

    def offload(self) -> None:
        """Wait in host memory; not at ZeRO-3."""
        move(self._models, torch.device("cpu"))

    def onload(self) -> None:
        move(self._models, self.device)

    def samples(self, num: int) -> list[dict[str, Any]]:
        """The first few of the latest call, for the report; none of a worker just replaced."""
        if self.latest is None:
            return []
        answered, rewarded = self.latest
        return [
            {
                "prompt": answered[i].question,
                "answer": answered[i].text,
                "total": rewarded.totals[i],
                "components": {name: xs[i] for name, xs in rewarded.components.items()},
            }
            for i in range(min(num, len(answered)))
        ]

    @property
    def _models(self) -> list[ValueModel]:
        return [model for model in (self.model, self.judging) if isinstance(model, ValueModel)]

    def _model_scores(
        self, model: Scorer | None, whole: Sequences
    ) -> tuple[NDArray[np.int64], list[float] | None]:
        """Rows of this rank's share, and the model's score of each."""
        if model is None:
            shares = share_by_length(whole.lengths, dist.get_world_size())
            return shares[dist.get_rank()], None
        index, scores = [], []
        for forward in my_forwards(whole, np.arange(len(whole)), self.config):
            batch = forward.batch.to(self.device)
            index.append(forward.rows)
            scores.append(last_values(model(batch), batch)[: len(forward.rows)])
        return np.concatenate(index), torch.cat(scores).tolist()

    def _load(self, key: str, name: str | None) -> Scorer | None:
        """Raises ConfigError: it is no reward model, or reads other token ids than the actor
        writes."""
        if name is None:
            return None
        with errors_for_key(key):
            names = "the actor", f"{key}={name}"
            model = self._partitioned(name) if self.pool.zero_stage else self._whole(name)
            check_same_speech(self.tokenizer, load_base(name), names=names)
        return model

    def _whole(self, name: str) -> ValueModel:
        model, _ = load_value_model(name, dtype=role_dtype(self.pool.precision, self.device))
        return model.to(resting_device(self.pool))

    def _partitioned(self, name: str) -> Scorer:
        """DeepSpeed is imported only where it is used: it takes seconds."""
        from medgpt.engine.value import partitioned_reward_model

        engine = EngineConfig(zero_stage=self.pool.zero_stage, precision=self.pool.precision)
        return partitioned_reward_model(name, engine, self.device)

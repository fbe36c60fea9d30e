"""The held-out questions put to the policy by the pools, for the judge to mark."""

from typing import Any

import numpy as np

from medgpt.config.ppo import PPOStageConfig
from medgpt.data.tokenized.chat import generation_ids
from medgpt.models.tokenizer import load_base
from medgpt.rlhf.heldout_questions import Judge
from medgpt.rlhf.pools.pool import Pool
from medgpt.rlhf.pools.pools import Pools
from medgpt.rlhf.roles.reward import Reward
from medgpt.rlhf.roles.rollout import Rollout
from medgpt.rlhf.rollout_batch import Ragged, join_sequences


class Judging:
    """Asks what the judge wants to know, greedily, and has its reward model score the answers."""

    def __init__(self, config: PPOStageConfig, pools: Pools) -> None:
        assert config.model.name is not None
        self.config, self.pools = config, pools
        self.rollout: Pool[Rollout] = pools.pools["rollout"]
        self.reward: Pool[Reward] = pools.pools["reward"]
        self.judge = Judge(config.judge, config.run.seed)
        self.tokenizer = load_base(config.model.name)
        prompts = [generation_ids(self.tokenizer, asked.messages) for asked in self.judge.asked]
        self.prompts = pools.put(Ragged.of(prompts, np.int32))

    def due(self, iteration: int) -> bool:
        return self.judge.due(iteration)

    def metrics(self) -> dict[str, float]:
        """Marks of the policy whose weights the rollout pool has."""
        longest = self.config.judge.max_new_tokens
        return self.marks(self.rollout.call(Rollout.answer, self.prompts, longest))

    def marks(self, answers: list[Any]) -> dict[str, float]:
        """Of refs of answers to all questions."""
        scores = None
        if self.config.judge.model is not None:
            parts = self.pools.get(self.reward.call(Reward.judge, *answers), "judge")
            index = np.concatenate([part[0] for part in parts])
            scores = np.concatenate([part[1] for part in parts])[np.argsort(index)].tolist()
        whole = join_sequences(self.pools.get(answers, "judge"))
        texts = [
            str(self.tokenizer.decode(whole.responses.row(i), skip_special_tokens=True)).strip()
            for i in range(len(whole))
        ]
        return self.judge.metrics(texts, scores)

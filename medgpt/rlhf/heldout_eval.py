"""Held-out evaluation of the policy: greedy answers, key-point and triage checks, judge model."""

from typing import Any

import numpy as np

from medgpt.config.model import THINKING
from medgpt.config.ppo import PPOStageConfig
from medgpt.data.tokenized.chat_template import generation_prompt_ids
from medgpt.models.answers import answer_text
from medgpt.models.tokenizer import load_tokenizer
from medgpt.rlhf.heldout_questions import HeldoutQuestions
from medgpt.rlhf.pools.pool import Pool
from medgpt.rlhf.pools.pools import Pools
from medgpt.rlhf.roles.reward import Reward
from medgpt.rlhf.roles.rollout import Rollout
from medgpt.rlhf.rollout_batch import Ragged, join_sequences


class HeldoutEval:
    """Answers the held-out questions on the rollout pool and scores the answers."""

    def __init__(self, config: PPOStageConfig, pools: Pools) -> None:
        assert config.model.name is not None
        self.config, self.pools = config, pools
        self.rollout: Pool[Rollout] = pools.pools["rollout"]
        self.reward: Pool[Reward] = pools.pools["reward"]
        self.question_set = HeldoutQuestions(config.judge, config.run.seed)
        self.tokenizer = load_tokenizer(config.model.name, config.model.trust_remote_code)
        prompts = [
            generation_prompt_ids(
                self.tokenizer, question.messages, thinking=THINKING[config.rollout.thinking]
            )
            for question in self.question_set.questions
        ]
        self.prompts = pools.put(Ragged.from_rows(prompts, np.int32))

    def is_due(self, iteration: int) -> bool:
        return self.question_set.is_due(iteration)

    def metrics(self) -> dict[str, float]:
        """Return the `judge/*` metrics of the weights that the rollout pool holds."""
        max_new_tokens = self.config.judge.max_new_tokens
        return self.score_answers(
            self.rollout.call(Rollout.generate_greedy, self.prompts, max_new_tokens)
        )

    def score_answers(self, answers: list[Any]) -> dict[str, float]:
        """Return the `judge/*` metrics of refs of the answers to all questions."""
        scores = None
        if self.config.judge.model is not None:
            parts = self.pools.get(self.reward.call(Reward.judge_scores, *answers), "judge")
            index = np.concatenate([part[0] for part in parts])
            scores = np.concatenate([part[1] for part in parts])[np.argsort(index)].tolist()
        config = self.config.rollout
        sequences = join_sequences(self.pools.get(answers, "judge"))
        texts = [
            answer_text(
                self.tokenizer,
                sequences.prompts.row(i).tolist(),
                sequences.responses.row(i).tolist(),
                thinking_tokens=config.thinking_tokens,
            ).strip()
            for i in range(len(sequences))
        ]
        return self.question_set.metrics(texts, scores)

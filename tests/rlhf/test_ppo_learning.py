"""PPO does what it is for: a fine-tuned model learns what a known rule rewards, as far as the
coefficient of the KL allows; and is halted where the reward pays for the wrong thing.

The roles are in this process: pools on Ray change no number (test_ppo_deaths.py)."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from medgpt.config import PPOStageConfig
from medgpt.data.chat import generation_ids
from medgpt.data.records import Message
from medgpt.models.tokenizer import load_base
from medgpt.rlhf.experience import Prompts, Ragged
from medgpt.rlhf.ppo import PPO
from medgpt.rlhf.rewards.answered import Answered
from tests.rlhf.cases import ppo_config
from tests.rlhf.inline import driver, numbers
from tests.rlhf.sft import held_out_prompts, save_fine_tuned, shuffled, train_prompts
from tests.rlhf.test_ppo import NO_RULES

RULE = "medgpt.rlhf.rewards.sample:causes_and_advice"
FUNCTION = 'reward.functions=[{name="known",path="%s"}]'
LEARN = (
    "optimizer.learning_rate=1e-3",
    "critic.optimizer.learning_rate=3e-3",
    "rollout.max_new_tokens=56",
    "ppo.rollout_batch_size=64",
    "ppo.global_batch_size=32",
    "ppo.epochs=2",
    "ppo.micro_batch_tokens=4096",
    "ppo.gae_lambda=1.0",
    "ppo.kl_coef=0.05",
)
ITERATIONS, REPEATS = 20, 4


class Mark(NamedTuple):
    """Mean reward of sampled answers to the held-out prompts."""

    mean: float
    error: float  # standard

    def above(self, other: "Mark") -> float:
        """In standard errors of the difference."""
        return (self.mean - other.mean) / math.hypot(self.error, other.error)


def length(answered: Sequence[Answered]) -> list[float]:
    """What a reward should not pay for."""
    return [len(a.text) / 10 for a in answered]


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    save_fine_tuned(folder)
    return folder


def prompts_of(config: PPOStageConfig, texts: Sequence[str], name: object) -> Prompts:
    tokenizer = load_base(str(config.model.name))
    ids = [generation_ids(tokenizer, [Message("user", text)]) for text in texts]
    return Prompts(
        sample_ids=[f"{name}-{i}" for i in range(len(texts))],
        ids=Ragged.of(ids, np.int32),
        messages=[json.dumps([["user", text]]) for text in texts],
    )


def stream_of(config: PPOStageConfig) -> Callable[[int], Iterator[Prompts]]:
    def stream(start: int) -> Iterator[Prompts]:
        batches = shuffled(train_prompts(), config.ppo.rollout_batch_size, config.run.seed)
        for iteration, texts in enumerate(batches):
            if iteration >= start:
                yield prompts_of(config, texts, iteration)

    return stream


def ppo_of(folder: Path, model: Path, *overrides: str, reward: str = RULE) -> PPO:
    folder.mkdir(exist_ok=True)
    config = ppo_config(folder, model, NO_RULES, FUNCTION % reward, *LEARN, *overrides)
    return driver(config, ITERATIONS, prompts=stream_of(config))


def mark(ppo: PPO) -> Mark:
    prompts = prompts_of(ppo.config, held_out_prompts(), "held-out")
    ppo.sync(-2)
    rollout, reward = (ppo.pools.pools[role].worker for role in ("rollout", "reward"))
    answers = [rollout.generate(prompts, i) for i in range(REPEATS)]
    rewards = np.mean([reward.score(prompts, part).totals for part in answers], axis=0)
    return Mark(float(rewards.mean()), float(rewards.std(ddof=1)) / math.sqrt(len(rewards)))


def test_ppo_raises_what_is_rewarded_on_held_out_prompts_with_the_kl_under_its_target(
    fine_tuned: Path, tmp_path: Path
) -> None:
    ppo = ppo_of(tmp_path, fine_tuned, "ppo.kl_controller=adaptive", "ppo.kl_target=4.0")
    before = mark(ppo)
    ppo.fit()
    after = mark(ppo)
    kl = [line["actor/kl_ref"] for line in numbers(ppo.run)]
    print(f"SFT {before}, PPO {after}, {after.above(before):.1f} errors, KL {kl[-1]:.2f} nats")
    assert after.above(before) > 2
    assert after.mean > before.mean + 0.2
    assert 0 < np.mean(kl[-3:]) < ppo.config.ppo.kl_target

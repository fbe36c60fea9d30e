"""PPO raises the reward of a fine-tuned model as far as the KL coefficient allows, and is halted
where the reward pays for the wrong thing.

The roles are in this process: pools on Ray change no number (test_ppo_deaths.py)."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from medgpt.config.ppo import PPOStageConfig
from medgpt.data.sources.records import Message
from medgpt.data.tokenized.chat_template import generation_prompt_ids
from medgpt.models.tokenizer import load_tokenizer
from medgpt.rlhf.diagnosis import Diverged
from medgpt.rlhf.ppo import PPO
from medgpt.rlhf.rewards.reward_sample import RewardSample
from medgpt.rlhf.rewards.sample_corpus import ADVICE, NUM_CAUSES, known_causes
from medgpt.rlhf.rollout_batch import Prompts, Ragged
from tests.rlhf.cases import ppo_config
from tests.rlhf.inline import comparable_metrics, make_ppo
from tests.rlhf.sft import held_out_prompts, save_fine_tuned, shuffled, train_prompts
from tests.rlhf.test_ppo import NO_RULES

RULE = "medgpt.rlhf.rewards.sample_corpus:causes_and_advice"
LENGTH = "tests.rlhf.test_ppo_learning:length"
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
SLOWLY = "optimizer.learning_rate=1e-4"  # or the noise of whitened advantages moves the policy
ITERATIONS, REPEATS = 20, 4


class HeldoutReward(NamedTuple):
    """Mean reward of sampled answers to the held-out prompts."""

    mean: float
    error: float  # standard

    def above(self, other: "HeldoutReward") -> float:
        """Difference in standard errors of the difference."""
        return (self.mean - other.mean) / math.hypot(self.error, other.error)


def length(samples: Sequence[RewardSample]) -> list[float]:
    """A flawed reward: the length of the answer."""
    return [len(a.text) / 10 for a in samples]


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    save_fine_tuned(folder)
    return folder


def prompts_of(config: PPOStageConfig, texts: Sequence[str], name: object) -> Prompts:
    tokenizer = load_tokenizer(str(config.model.name))
    ids = [generation_prompt_ids(tokenizer, [Message("user", text)]) for text in texts]
    return Prompts(
        sample_ids=[f"{name}-{i}" for i in range(len(texts))],
        ids=Ragged.from_rows(ids, np.int32),
        messages=[json.dumps([["user", text]]) for text in texts],
    )


def stream_of(config: PPOStageConfig) -> Callable[[int], Iterator[Prompts]]:
    def stream(start: int) -> Iterator[Prompts]:
        batches = shuffled(train_prompts(), config.ppo.rollout_batch_size, config.run.seed)
        for iteration, texts in enumerate(batches):
            if iteration >= start:
                yield prompts_of(config, texts, iteration)

    return stream


def judge_of(folder: Path) -> tuple[str, ...]:
    """Config of a judge on the held-out prompts: are causes stated and advice given?"""
    path = folder / "held_out.jsonl"
    lines = []
    for prompt in held_out_prompts():
        causes = next(names for symptom, names in known_causes().items() if symptom in prompt)
        points = [*([name] for name in causes[:NUM_CAUSES]), ADVICE]
        lines.append(json.dumps({"prompt": prompt, "key_points": points, "kind": "rlhf"}) + "\n")
    path.write_text("".join(lines), "utf-8")
    options_of_judge = ("judge.every=2", "judge.triage=0", "judge.max_new_tokens=56")
    return (*options_of_judge, f"judge.key_points={path}")


def ppo_of(folder: Path, model: Path, *overrides: str, reward: str = RULE) -> PPO:
    folder.mkdir(exist_ok=True)
    config = ppo_config(folder, model, NO_RULES, FUNCTION % reward, *LEARN, *overrides)
    return make_ppo(config, ITERATIONS, prompts=stream_of(config))


def heldout_reward(ppo: PPO) -> HeldoutReward:
    prompts = prompts_of(ppo.config, held_out_prompts(), "held-out")
    ppo.sync(-2)
    rollout, reward = (ppo.pools.pools[role].worker for role in ("rollout", "reward"))
    answers = [rollout.generate(prompts, i) for i in range(REPEATS)]
    rewards = np.mean([reward.score(prompts, part).totals for part in answers], axis=0)
    return HeldoutReward(
        float(rewards.mean()), float(rewards.std(ddof=1)) / math.sqrt(len(rewards))
    )


def kl_of(ppo: PPO) -> float:
    """KL to the reference in nats, mean of the last three iterations."""
    return float(np.mean([line["actor/kl_ref"] for line in comparable_metrics(ppo.run)[-3:]]))


def print_rewards(before: HeldoutReward, after: HeldoutReward, kl: float) -> None:
    errors = after.above(before)
    print(f"SFT {before}, PPO {after}, {errors:.1f} errors, KL {kl:.3f} nats")


def test_ppo_raises_held_out_reward_with_the_kl_under_its_target(
    fine_tuned: Path, tmp_path: Path
) -> None:
    target = ("ppo.kl_controller=adaptive", "ppo.kl_target=4.0")
    ppo = ppo_of(tmp_path, fine_tuned, *target, *judge_of(tmp_path))
    before = heldout_reward(ppo)
    ppo.fit()
    after = heldout_reward(ppo)
    print_rewards(before, after, kl_of(ppo))
    assert after.above(before) > 2
    assert after.mean > before.mean + 0.2
    assert 0 < kl_of(ppo) < ppo.config.ppo.kl_target
    checks = [
        line["judge/checks"] for line in comparable_metrics(ppo.run) if "judge/checks" in line
    ]
    assert checks[-1] > checks[0]  # and the run was not halted


def test_a_very_large_kl_coefficient_freezes_the_policy(fine_tuned: Path, tmp_path: Path) -> None:
    rewards_after, kls = [], []
    for coef in (0.05, 100):
        ppo = ppo_of(tmp_path / str(coef), fine_tuned, SLOWLY, f"ppo.kl_coef={coef}")
        before = heldout_reward(ppo)
        ppo.fit()
        rewards_after.append(heldout_reward(ppo))
        kls.append(kl_of(ppo))
        print_rewards(before, rewards_after[-1], kls[-1])
    assert kls[0] > 0.5
    assert kls[1] < 0.1 * kls[0]
    assert rewards_after[0].above(before) > 2
    assert abs(rewards_after[1].above(before)) < 2


def test_a_length_reward_halts_by_the_judge(fine_tuned: Path, tmp_path: Path) -> None:
    ppo = ppo_of(tmp_path, fine_tuned, *judge_of(tmp_path), "ppo.kl_coef=0", reward=LENGTH)
    with pytest.raises(Diverged, match=r"score rose from .* while the held-out judge/checks fell"):
        ppo.fit()
    before, first, *_, last = comparable_metrics(ppo.run)
    assert last["step"] < ITERATIONS
    assert last["rollout/response_tokens"] > 1.5 * first["rollout/response_tokens"]
    assert last["judge/checks"] < 0.6 * before["judge/checks"]


def test_a_length_reward_halts_by_max_kl(fine_tuned: Path, tmp_path: Path) -> None:
    options = ("ppo.kl_coef=0", "diagnosis.max_kl=10", "diagnosis.window=2")
    ppo = ppo_of(tmp_path, fine_tuned, *options, reward=LENGTH)
    with pytest.raises(Diverged, match=r"nats an answer from the reference.*max_kl=10"):
        ppo.fit()
    assert comparable_metrics(ppo.run)[-1]["step"] < ITERATIONS

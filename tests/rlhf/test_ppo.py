"""The driver's loop on roles in this process: it learns, repeats itself, resumes, survives."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from medgpt.config import PPOStageConfig
from medgpt.rlhf.diagnosis import Diverged, History
from medgpt.rlhf.pool import PoolDied
from medgpt.rlhf.ppo import PPO
from medgpt.rlhf.rewards.answered import Answered
from medgpt.rlhf.roles.actor import Actor
from medgpt.rlhf.state import newest
from medgpt.runs import Run
from tests.rlhf.cases import ppo_config
from tests.rlhf.inline import driver, numbers
from tests.train.audits import counted

NO_RULES = (
    "reward.rules={urgency=0.0,dose=0.0,diagnosis=0.0,hotline=0.0,language=0.0,repetition=0.0}"
)
ONLY = (NO_RULES, 'reward.functions=[{name="mine",path="tests.rlhf.test_ppo:%s"}]')
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def letters(answered: Sequence[Answered]) -> list[float | None]:
    """Share of an answer's characters that are Latin letters."""
    return [sum(c in LETTERS for c in a.text.lower()) / max(1, len(a.text)) for a in answered]


def every_third(answered: Sequence[Answered]) -> list[float | None]:
    """Fails for some samples."""
    return [None if int(a.sample_id.split("-")[1]) % 3 == 0 else 1.0 for a in answered]


def config_of(folder: Path, base: Path, *overrides: str, reward: str = "letters") -> PPOStageConfig:
    folder.mkdir(exist_ok=True)
    rules, function = ONLY
    return ppo_config(folder, base, rules, function % reward, *overrides)


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory) -> Run:
    """Six iterations, saved at every other one."""
    config = config_of(tmp_path_factory.mktemp("whole"), base, "ppo.checkpoint_every=2")
    ppo = driver(config, 6)
    ppo.fit()
    return ppo.run


def stop_at(iteration: int, ppo: PPO) -> None:
    """Run until the driver asks for the prompts of `iteration`, where it is killed."""
    stream = ppo.prompts_from

    def until(start: int):
        for number, prompts in enumerate(stream(start), start):
            if number == iteration:
                raise KeyboardInterrupt
            yield prompts

    ppo.prompts_from = until
    with pytest.raises(KeyboardInterrupt):
        ppo.fit()


def test_the_same_seed_gives_the_same_metrics_and_another_does_not(base, tmp_path, uninterrupted):
    for name, seed in (("same", 0), ("other", 1)):
        ppo = driver(config_of(tmp_path / name, base, f"run.seed={seed}"), 6)
        ppo.fit()
        assert (numbers(ppo.run) == numbers(uninterrupted)) == (seed == 0)


@pytest.mark.parametrize("iteration", [1, 3, 4, 5])
def test_a_killed_driver_goes_on_as_if_nothing_had_been(base, tmp_path, uninterrupted, iteration):
    config = config_of(tmp_path, base, "ppo.checkpoint_every=2")
    stop_at(iteration, driver(config, 6))
    ppo = driver(config, 6)
    ppo.fit()
    assert numbers(ppo.run) == numbers(uninterrupted)
    assert ppo.attempt == 2


@pytest.mark.parametrize(
    ("role", "call"),
    [
        ("rollout", ("generate", 4)),
        ("reward", ("score", 3)),
        ("reference", ("logprobs", 4)),
        ("actor", ("logprobs", 1)),
        ("actor", ("update", 4)),
        ("critic", ("values", 3)),
        ("critic", ("update", 6)),
        ("actor", ("save", 2)),
        ("critic", ("save", 3)),
    ],
)
def test_a_pool_that_dies_changes_no_number(base, tmp_path, uninterrupted, role, call):
    ppo = driver(config_of(tmp_path, base, "ppo.checkpoint_every=2"), 6)
    ppo.pools.pools[role].dies_at = call
    ppo.fit()

    assert role in ppo.pools.rebuilt
    assert numbers(ppo.run) == numbers(uninterrupted)


def test_a_pool_that_dies_at_the_very_end_costs_nothing(base, tmp_path, uninterrupted):
    ppo = driver(config_of(tmp_path, base, "ppo.checkpoint_every=2"), 6)
    ppo.actor.dies_at = ("export", 1)
    url = (ppo.run.folder / "model").url
    ppo.fit(lambda: ppo.pools.get(ppo.actor.call(Actor.export, url), "export"))
    assert ppo.pools.rebuilt == ["actor"]
    assert ppo.run.model.exists("model.safetensors")
    assert numbers(ppo.run) == numbers(uninterrupted)


def test_a_death_after_an_iteration_is_logged_costs_no_checkpoint(base, tmp_path):
    ppo = driver(config_of(tmp_path, base), 1)
    ppo.reward.dies_at = ("samples", 1)
    ppo.fit()
    found = newest(ppo.run)
    assert found is not None
    assert found[1].iteration == 1


def test_too_many_deaths_end_the_run(base, tmp_path):
    ppo = driver(config_of(tmp_path, base, "cluster.max_failures=0"), 2)
    ppo.pools.pools["reward"].dies_at = ("score", 1)
    with pytest.raises(PoolDied, match="reward pool: rank 0"):
        ppo.fit()


def test_rollouts_one_step_ahead_are_older_and_survive_a_kill(base, tmp_path, uninterrupted):
    config = config_of(
        tmp_path / "ahead", base, "ppo.async_rollouts=true", "ppo.checkpoint_every=2"
    )
    whole = driver(config, 6)
    whole.fit()
    lines = numbers(whole.run)
    assert [line["sync/version"] for line in lines] == [0, 1, 2, 3, 4, 4]
    assert all(line["rollout/importance_weight"] > 0 for line in lines)
    assert lines != numbers(uninterrupted)

    config = config_of(
        tmp_path / "killed", base, "ppo.async_rollouts=true", "ppo.checkpoint_every=2"
    )
    stop_at(5, driver(config, 6))
    again = driver(config, 6)
    again.fit()
    for found, want in zip(numbers(again.run), lines, strict=True):
        assert {**found, "sync/version": 0} == {**want, "sync/version": 0}


def score_of(ppo: PPO) -> float:
    """Mean reward of greedy answers to prompts of no iteration."""
    prompts = next(ppo.prompts_from(10_000))
    ppo.sync(99)
    rollout, reward = (ppo.pools.pools[role].worker for role in ("rollout", "reward"))
    found = [rollout.generate(prompts, i) for i in range(6)]
    return float(np.mean([reward.score(prompts, part).totals for part in found]))


def test_the_policy_learns_what_is_rewarded(base, tmp_path):
    config = config_of(
        tmp_path, base, "optimizer.learning_rate=3e-3", "critic.optimizer.learning_rate=3e-3",
        "ppo.kl_coef=0.0", "diagnosis.max_kl=0.0",
    )  # fmt: skip
    ppo = driver(config, 15)
    before = score_of(ppo)
    ppo.fit()
    assert score_of(ppo) > before + 0.2


def test_a_policy_that_leaves_the_reference_is_halted_with_a_diagnosis(base, tmp_path):
    config = config_of(
        tmp_path, base, "optimizer.learning_rate=3e-3", "ppo.kl_coef=0.0",
        "diagnosis.max_kl=0.5", "diagnosis.window=2",
    )  # fmt: skip
    ppo = driver(config, 40)
    with pytest.raises(Diverged, match="nats"):
        ppo.fit()
    assert 2 < len(ppo.run.metrics()) < 40


def test_samples_without_a_reward_are_counted_and_left_out(base, tmp_path):
    ppo = driver(config_of(tmp_path, base, reward="every_third"), 1)
    ppo.fit()
    (line,) = numbers(ppo.run)
    assert line["ppo/masked"] == 4
    assert line["rewards/masked"] == pytest.approx(1 / 3)
    assert line["ppo/score_mean"] == 1


def test_the_audit_tells_what_was_learnt_from_in_which_iteration(base, tmp_path):
    config = config_of(tmp_path, base, "ppo.audit=true", reward="every_third")
    stop_at(1, driver(config, 2))  # before a checkpoint: the first iteration is done again
    ppo = driver(config, 2)
    ppo.fit()
    lines = counted(ppo.run)
    assert {line["attempt"] for line in lines} == {2}
    found = {(line["step"], line["sample_id"]) for line in lines}
    assert found == {(k, f"{k}-{i}") for k in range(2) for i in range(12) if i % 3}
    assert len(lines) == len(found)


def test_the_critic_warms_up_alone(base, tmp_path):
    ppo = driver(config_of(tmp_path, base, "critic.warmup_iterations=2"), 3)
    ppo.fit()
    first, second, third = numbers(ppo.run)
    assert "actor/loss" not in first
    assert second["actor/kl_ref"] == pytest.approx(0, abs=1e-5)
    assert "actor/loss" in third
    assert first["critic/loss"] > 0


def test_an_adaptive_coefficient_is_part_of_the_checkpoint(base, tmp_path):
    overrides = ("ppo.kl_controller=adaptive", "ppo.kl_target=1e-3", "ppo.kl_horizon=100")
    config = config_of(tmp_path, base, *overrides, "ppo.normalise_scores=true")
    ppo = driver(config, 3)
    ppo.fit()
    coefs = [line["ppo/kl_coef"] for line in numbers(ppo.run)]
    assert coefs[0] == 0.05
    assert len(set(coefs)) == 3
    found = newest(ppo.run)
    assert found is not None
    assert found[1].kl_coef == ppo.state.kl_coef not in coefs
    assert found[1].score_stats.num == 36


def test_samples_are_kept_for_the_report_unless_a_source_is_sensitive(base, tmp_path):
    ppo = driver(config_of(tmp_path / "open", base, "report.samples=2"), 1)
    ppo.fit()
    found = ppo.run.folder.read_json("rollouts.json")
    assert [(s["iteration"], s["prompt"]) for s in found] == [(1, "?")] * 2
    assert {"answer", "total", "components"} < found[0].keys()

    ppo = driver(config_of(tmp_path / "closed", base, "data.sources.0.sensitive=true"), 1)
    ppo.fit()
    assert not ppo.run.folder.exists("rollouts.json")


def test_who_asks_is_told_of_every_judgement_once_it_is_saved_also_after_a_kill(base, tmp_path):
    told: list[tuple[int, bool]] = []

    def judged(history: History) -> None:
        found = newest(ppo.run)
        step = int(history[-1]["step"])
        told.append((step, found is not None and found[1].iteration == step))

    overrides = ("judge.every=2", "judge.triage=4", "ppo.checkpoint_every=2")
    config = config_of(tmp_path, base, *overrides, "judge.max_new_tokens=4")
    ppo = driver(config, 4, judged=judged)
    stop_at(3, ppo)
    assert told == [(0, False), (2, True)]
    ppo = driver(config, 4, judged=judged)
    ppo.fit()
    assert told[2:] == [(2, True), (4, True)]

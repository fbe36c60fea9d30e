"""The PPO loop on roles in this process: learning, determinism, resume, recovery."""

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from medgpt.config.ppo import PPOStageConfig
from medgpt.rlhf.checkpoint import newest_checkpoint
from medgpt.rlhf.diagnosis import Diverged, History
from medgpt.rlhf.pools.pools import DataLost, NodesDraining, PoolDied
from medgpt.rlhf.ppo import PPO
from medgpt.rlhf.rewards.reward_sample import RewardSample
from medgpt.rlhf.roles.actor import Actor
from medgpt.runs import Run
from tests.rlhf.cases import ppo_config, save_reward_model
from tests.rlhf.inline import comparable_metrics, make_ppo
from tests.train.audit_log import effective_lines

NO_RULES = (
    "reward.rules={urgency=0.0,dose=0.0,diagnosis=0.0,hotline=0.0,language=0.0,repetition=0.0}"
)
ONLY = (NO_RULES, 'reward.functions=[{name="mine",path="tests.rlhf.test_ppo:%s"}]')
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def letters(answered: Sequence[RewardSample]) -> list[float | None]:
    """Share of an answer's characters that are Latin letters."""
    return [sum(c in LETTERS for c in a.text.lower()) / max(1, len(a.text)) for a in answered]


def fail_every_third(answered: Sequence[RewardSample]) -> list[float | None]:
    """Fails for some samples."""
    return [None if int(a.sample_id.split("-")[1]) % 3 == 0 else 1.0 for a in answered]


def config_of(folder: Path, base: Path, *overrides: str, reward: str = "letters") -> PPOStageConfig:
    folder.mkdir(exist_ok=True)
    rules, function = ONLY
    return ppo_config(folder, base, rules, function % reward, *overrides)


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory) -> Run:
    """Six iterations with a checkpoint every second one."""
    config = config_of(tmp_path_factory.mktemp("whole"), base, "ppo.checkpoint_every=2")
    ppo = make_ppo(config, 6)
    ppo.fit()
    return ppo.run


ASYNC = ("ppo.async_rollouts=true",)


@pytest.fixture(scope="module")
def async_run(base, tmp_path_factory) -> Run:
    """The same with asynchronous rollouts, one iteration ahead."""
    ppo = make_ppo(config_of(tmp_path_factory.mktemp("ahead"), base, *ASYNC), 6)
    ppo.fit()
    return ppo.run


def stop_at(iteration: int, ppo: PPO) -> None:
    """Run until the loop requests the prompts of `iteration`, then kill it."""
    stream = ppo.prompts.open_at

    def until(start: int):
        for number, prompts in enumerate(stream(start), start):
            if number == iteration:
                raise KeyboardInterrupt
            yield prompts

    ppo.prompts.open_at = until
    with pytest.raises(KeyboardInterrupt):
        ppo.fit()


def test_the_same_seed_gives_the_same_metrics_and_another_does_not(base, tmp_path, uninterrupted):
    for name, seed in (("same", 0), ("other", 1)):
        ppo = make_ppo(config_of(tmp_path / name, base, f"run.seed={seed}"), 6)
        ppo.fit()
        assert (comparable_metrics(ppo.run) == comparable_metrics(uninterrupted)) == (seed == 0)


@pytest.mark.parametrize("iteration", [1, 3, 4, 5])
def test_a_killed_driver_resumes_with_the_same_metrics(base, tmp_path, uninterrupted, iteration):
    config = config_of(tmp_path, base, "ppo.checkpoint_every=2")
    stop_at(iteration, make_ppo(config, 6))
    ppo = make_ppo(config, 6)
    ppo.fit()
    assert comparable_metrics(ppo.run) == comparable_metrics(uninterrupted)
    assert ppo.log.attempt == 2


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
    ppo = make_ppo(config_of(tmp_path, base, "ppo.checkpoint_every=2"), 6)
    ppo.pools.pools[role].dies_at = call
    ppo.fit()

    assert role in ppo.pools.rebuilt
    assert comparable_metrics(ppo.run) == comparable_metrics(uninterrupted)


@pytest.mark.parametrize("what", ["score", "update"])
def test_data_lost_while_fetched_costs_no_metrics_line(base, tmp_path, uninterrupted, what):
    ppo = make_ppo(config_of(tmp_path, base, "ppo.checkpoint_every=2"), 6)
    ppo.pools.dies_in_get = (what, "actor" if what == "update" else "reward")
    ppo.fit()
    assert comparable_metrics(ppo.run) == comparable_metrics(uninterrupted)


@pytest.mark.parametrize(
    ("role", "call", "rebuilt"),
    [
        ("reward", ("score", 4), []),
        ("critic", ("values", 1), []),
        ("actor", ("update", 4), ["actor", "critic"]),
        ("critic", ("update", 1), ["actor", "critic"]),
    ],
)
def test_a_batch_whose_data_is_lost_is_done_again(
    base, tmp_path, uninterrupted, role, call, rebuilt
):
    ppo = make_ppo(config_of(tmp_path, base, "ppo.checkpoint_every=2"), 6)
    ppo.pools.pools[role].loses_at = call
    ppo.fit()
    assert ppo.pools.rebuilt == rebuilt
    assert comparable_metrics(ppo.run) == comparable_metrics(uninterrupted)


def test_data_that_is_lost_again_and_again_ends_the_run(base, tmp_path):
    ppo = make_ppo(config_of(tmp_path, base, "cluster.max_failures=2"), 2)
    ppo.pools.pools["reward"].loses_at = ("score", None)
    with pytest.raises(DataLost, match="gone"):
        ppo.fit()
    assert ppo.num_failures == 3


def test_a_node_that_takes_several_pools_counts_as_one_failure(base, tmp_path, uninterrupted):
    ppo = make_ppo(config_of(tmp_path, base, "ppo.checkpoint_every=2", "cluster.max_failures=1"), 6)
    ppo.pools.dies_in_get = ("update", "actor reward rollout")
    ppo.fit()
    assert ppo.pools.rebuilt == ["actor", "reward", "rollout", "critic"]
    assert comparable_metrics(ppo.run) == comparable_metrics(uninterrupted)


def test_samples_that_die_with_their_pool_cost_no_checkpoint(base, tmp_path):
    config = config_of(tmp_path, base, "ppo.checkpoint_every=1", "report.every=1")
    ppo = make_ppo(config, 3)
    ppo.pools.pools["reward"].dies_at = ("report_samples", 2)
    ppo.fit()
    assert ppo.pools.pools["actor"].calls.count("save") == 3
    assert ppo.pools.rebuilt == ["reward"]
    kept = ppo.run.folder.read_json("rollouts.json")
    assert {sample["iteration"] for sample in kept} == {1, 3}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["in turns", "ahead"])
@pytest.mark.parametrize(
    ("roles", "wait"),
    [
        (["rollout"], ("generate", 1)),
        (["actor", "reward"], ("score", 1)),
        (["reward"], ("nodes", 2)),
        (["actor"], ("score", 4)),
        (["critic", "rollout"], ("generate", 4)),
        (["actor", "reference"], ("nodes", 5)),
    ],
)
def test_pools_that_move_off_a_draining_node_change_no_number(
    base, tmp_path, uninterrupted, async_run, roles, wait, asynchronous
):
    overrides = ASYNC if asynchronous else ()
    config = config_of(
        tmp_path, base, "ppo.checkpoint_every=2", "cluster.max_failures=0", *overrides
    )
    ppo = make_ppo(config, 6)
    ppo.pools.draining_roles, ppo.pools.drains_at = roles, wait
    ppo.fit()
    assert ppo.pools.moved == roles
    assert comparable_metrics(ppo.run) == comparable_metrics(
        async_run if asynchronous else uninterrupted
    )
    assert ppo.log.attempt == 2
    assert ppo.pools.pools["actor"].calls.count("update") == 6  # no update was repeated


def test_more_preemptions_than_allowed_end_the_run(base, tmp_path):
    ppo = make_ppo(config_of(tmp_path, base, "cluster.max_preemptions=0"), 2)
    ppo.pools.draining_roles, ppo.pools.drains_at = ["actor"], ("nodes", 2)
    with pytest.raises(NodesDraining, match="a node of the actor pool will be drained in 30 s"):
        ppo.fit()


JUDGED = ("judge.every=1", "judge.triage=4", "judge.max_new_tokens=4")


def test_a_death_during_held_out_evaluation_keeps_the_history(base, tmp_path):
    histories = []
    for role, call in (
        ("rollout", None),
        ("rollout", ("generate_greedy", 3)),
        ("actor", ("logprobs", 2)),
    ):
        folder = tmp_path / f"{role}-{call}"
        ppo = make_ppo(config_of(folder, base, "ppo.checkpoint_every=1", *JUDGED), 3)
        ppo.pools.pools[role].dies_at = call
        ppo.fit()
        assert [line["step"] for line in ppo.log.history] == [0, 1, 2, 3]
        assert all("judge/checks" in line for line in ppo.log.history)
        assert all("ppo/score_mean" in line for line in ppo.log.history[1:])
        histories.append(comparable_metrics(ppo.run))
    assert histories[0] == histories[1] == histories[2]


def test_the_actor_without_adapters_gives_the_reference_logprobs(base, tmp_path):
    lora = ("model.lora.rank=4", "model.lora.alpha=64.0")
    runs = []
    for in_actor in ("true", "false"):
        config = config_of(tmp_path / in_actor, base, *lora, f"pools.reference_in_actor={in_actor}")
        ppo = make_ppo(config, 3)
        ppo.fit()
        assert ("reference" in ppo.pools.pools) == (in_actor == "false")
        assert "reference_logprobs" in ppo.pools.pools["actor"].calls or in_actor == "false"
        runs.append(comparable_metrics(ppo.run))
    assert runs[0][-1]["actor/kl_ref"] != 0
    for one, other in zip(*runs, strict=True):
        assert one == {name: pytest.approx(value, abs=1e-5) for name, value in other.items()}


def test_the_judge_model_scores_the_policy(base, tmp_path):
    judge = save_reward_model(base, tmp_path / "judge")
    options = ("judge.every=2", "judge.triage=4", "judge.max_new_tokens=4")
    ppo = make_ppo(config_of(tmp_path, base, f"judge.model={judge}", *options), 3)
    ppo.fit()
    lines = comparable_metrics(ppo.run)
    assert [line["step"] for line in lines if "judge/score" in line] == [0, 2]
    assert "rewards/score" not in lines[1]  # training does not see it
    asked = ppo.heldout_eval.question_set.questions
    reward, rollout = (ppo.pools.pools[role].worker for role in ("reward", "rollout"))
    ppo.sync(9)
    answers = rollout.generate_greedy(ppo.heldout_eval.prompts.get(), 4)
    assert len(answers) == len(asked) == 4
    index, scores = reward.judge_scores(answers)
    metrics = ppo.heldout_eval.metrics()
    assert metrics["judge/score"] == pytest.approx(np.mean(scores))
    assert sorted(index) == [0, 1, 2, 3]
    assert len(set(scores)) == 4


def test_speed_and_memory_metrics_come_from_the_workers(base, tmp_path):
    ppo = make_ppo(config_of(tmp_path, base), 2)
    ppo.fit()
    for line in ppo.run.metrics():
        tokens = line["rollout/response_tokens"] * 12
        assert line["rollout/tokens_per_s"] == pytest.approx(tokens / 2.0)
        assert {n: x for n, x in line.items() if n.startswith("memory/")} == {
            "memory/rss_gb": 0.5,
            **{f"memory/{role}_rss_gb": 0.5 for role in ppo.pools.pools},
        }


def test_a_restarted_run_leaves_no_writer_thread(base, tmp_path):
    before = set(threading.enumerate())
    ppo = make_ppo(config_of(tmp_path, base), 2)
    ppo.pools.pools["actor"].dies_at = ("update", 2)
    ppo.fit()
    assert ppo.log.attempt == 2
    assert set(threading.enumerate()) == before


def test_a_pool_that_dies_at_the_very_end_costs_nothing(base, tmp_path, uninterrupted):
    ppo = make_ppo(config_of(tmp_path, base, "ppo.checkpoint_every=2"), 6)
    ppo.actor.dies_at = ("export", 1)
    url = (ppo.run.folder / "model").url
    ppo.fit(lambda: ppo.pools.get(ppo.actor.call(Actor.export, url), "export"))
    assert ppo.pools.rebuilt == ["actor"]
    assert ppo.run.model.exists("model.safetensors")
    assert comparable_metrics(ppo.run) == comparable_metrics(uninterrupted)


def test_a_death_after_an_iteration_is_logged_costs_no_checkpoint(base, tmp_path):
    ppo = make_ppo(config_of(tmp_path, base), 1)
    ppo.reward.dies_at = ("report_samples", 1)
    ppo.fit()
    checkpoint = newest_checkpoint(ppo.run)
    assert checkpoint is not None
    assert checkpoint[1].iteration == 1


def test_too_many_deaths_end_the_run(base, tmp_path):
    ppo = make_ppo(config_of(tmp_path, base, "cluster.max_failures=0"), 2)
    ppo.pools.pools["reward"].dies_at = ("score", 1)
    with pytest.raises(PoolDied, match="reward pool: rank 0"):
        ppo.fit()


def test_rollouts_one_step_ahead_are_older_and_survive_a_kill(base, tmp_path, uninterrupted):
    config = config_of(
        tmp_path / "ahead", base, "ppo.async_rollouts=true", "ppo.checkpoint_every=2"
    )
    unkilled = make_ppo(config, 6)
    unkilled.fit()
    lines = comparable_metrics(unkilled.run)
    assert [line["sync/version"] for line in lines] == [0, 1, 2, 3, 4, 4]
    assert all(line["rollout/importance_weight"] > 0 for line in lines)
    assert lines != comparable_metrics(uninterrupted)

    config = config_of(
        tmp_path / "killed", base, "ppo.async_rollouts=true", "ppo.checkpoint_every=2"
    )
    stop_at(5, make_ppo(config, 6))
    resumed = make_ppo(config, 6)
    resumed.fit()
    for line, expected in zip(comparable_metrics(resumed.run), lines, strict=True):
        assert {**line, "sync/version": 0} == {**expected, "sync/version": 0}


def score_of(ppo: PPO) -> float:
    """Mean reward of sampled answers to unseen prompts."""
    prompts = next(ppo.prompts.open_at(10_000))
    ppo.sync(99)
    rollout, reward = (ppo.pools.pools[role].worker for role in ("rollout", "reward"))
    answers = [rollout.generate(prompts, i) for i in range(6)]
    return float(np.mean([reward.score(prompts, part).totals for part in answers]))


def test_the_policy_learns_what_is_rewarded(base, tmp_path):
    config = config_of(
        tmp_path, base, "optimizer.learning_rate=3e-3", "critic.optimizer.learning_rate=3e-3",
        "ppo.kl_coef=0.0", "diagnosis.max_kl=0.0",
    )  # fmt: skip
    ppo = make_ppo(config, 15)
    before = score_of(ppo)
    ppo.fit()
    assert score_of(ppo) > before + 0.2


def test_a_policy_that_leaves_the_reference_is_halted_with_a_diagnosis(base, tmp_path):
    config = config_of(
        tmp_path, base, "optimizer.learning_rate=3e-3", "ppo.kl_coef=0.0",
        "diagnosis.max_kl=0.5", "diagnosis.window=2",
    )  # fmt: skip
    ppo = make_ppo(config, 40)
    with pytest.raises(Diverged, match="nats"):
        ppo.fit()
    assert 2 < len(ppo.run.metrics()) < 40


def test_a_halted_run_behind_a_uri_keeps_its_metrics(base, tmp_path):
    url = f"memory://{tmp_path.name}/run"
    limits = ("diagnosis.max_kl=1e-9", "diagnosis.window=2", "ppo.checkpoint_every=100")
    ppo = make_ppo(config_of(tmp_path, base, f"run.dir={url}", *limits), 5)
    with pytest.raises(Diverged, match="nats"):
        ppo.fit()
    assert [line["step"] for line in ppo.run.metrics()] == [1, 2]
    ppo.run.folder.remove()


def test_samples_without_a_reward_are_counted_and_left_out(base, tmp_path):
    ppo = make_ppo(config_of(tmp_path, base, reward="fail_every_third"), 1)
    ppo.fit()
    (line,) = comparable_metrics(ppo.run)
    assert line["ppo/masked"] == 4
    assert line["rewards/masked"] == pytest.approx(1 / 3)
    assert line["ppo/score_mean"] == 1


def test_the_audit_lists_the_samples_learned_from_per_iteration(base, tmp_path):
    config = config_of(tmp_path, base, "ppo.audit=true", reward="fail_every_third")
    stop_at(1, make_ppo(config, 2))  # before a checkpoint: the first iteration is done again
    ppo = make_ppo(config, 2)
    ppo.fit()
    lines = effective_lines(ppo.run)
    assert {line["attempt"] for line in lines} == {2}
    samples = {(line["step"], line["sample_id"]) for line in lines}
    assert samples == {(k, f"{k}-{i}") for k in range(2) for i in range(12) if i % 3}
    assert len(lines) == len(samples)


def test_the_critic_warms_up_alone(base, tmp_path):
    ppo = make_ppo(config_of(tmp_path, base, "critic.warmup_iterations=2"), 3)
    ppo.fit()
    first, second, third = comparable_metrics(ppo.run)
    assert "actor/loss" not in first
    assert second["actor/kl_ref"] == pytest.approx(0, abs=1e-5)
    assert "actor/loss" in third
    assert first["critic/loss"] > 0


def test_an_adaptive_coefficient_is_part_of_the_checkpoint(base, tmp_path):
    overrides = ("ppo.kl_controller=adaptive", "ppo.kl_target=1e-3", "ppo.kl_horizon=100")
    config = config_of(tmp_path, base, *overrides, "ppo.normalize_scores=true")
    ppo = make_ppo(config, 3)
    ppo.fit()
    coefs = [line["ppo/kl_coef"] for line in comparable_metrics(ppo.run)]
    assert coefs[0] == 0.05
    assert len(set(coefs)) == 3
    checkpoint = newest_checkpoint(ppo.run)
    assert checkpoint is not None
    assert checkpoint[1].kl_coef == ppo.state.kl_coef not in coefs
    assert checkpoint[1].score_stats.num == 36


def test_samples_are_kept_for_the_report_unless_a_source_is_sensitive(base, tmp_path):
    ppo = make_ppo(config_of(tmp_path / "open", base, "report.samples=2"), 1)
    ppo.fit()
    samples = ppo.run.folder.read_json("rollouts.json")
    assert [(s["iteration"], s["prompt"]) for s in samples] == [(1, "?")] * 2
    assert {"answer", "total", "components"} < samples[0].keys()

    ppo = make_ppo(config_of(tmp_path / "closed", base, "data.sources.0.sensitive=true"), 1)
    ppo.fit()
    assert not ppo.run.folder.exists("rollouts.json")


def test_on_eval_is_called_after_each_saved_evaluation_also_after_a_kill(base, tmp_path):
    evaluated: list[tuple[int, bool]] = []

    def on_eval(history: History) -> None:
        checkpoint = newest_checkpoint(ppo.run)
        step = int(history[-1]["step"])
        evaluated.append((step, checkpoint is not None and checkpoint[1].iteration == step))

    overrides = ("judge.every=2", "judge.triage=4", "ppo.checkpoint_every=2")
    config = config_of(tmp_path, base, *overrides, "judge.max_new_tokens=4")
    ppo = make_ppo(config, 4, on_eval=on_eval)
    stop_at(3, ppo)
    assert evaluated == [(0, False), (2, True)]
    ppo = make_ppo(config, 4, on_eval=on_eval)
    ppo.fit()
    assert evaluated[2:] == [(2, True), (4, True)]

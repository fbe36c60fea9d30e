"""Bad input to PPO raises a clear error, or its samples are masked and counted.

Tested elsewhere: reward models with another tokenizer (test_reward.py), pools larger than the
cluster (tests/cluster), models with too few positions (tests/stages/test_ppo.py), failing reward
functions (rewards/test_functions.py).
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from medgpt.config.base import ConfigError
from medgpt.models.model_files import VALUE_HEAD_WEIGHT
from medgpt.models.tokenizer import load_tokenizer
from medgpt.rlhf.diagnosis import Diverged
from medgpt.rlhf.roles.actor import Actor
from medgpt.rlhf.roles.critic import Critic
from medgpt.rlhf.rollout_batch import Sequences
from medgpt.runs import Run
from medgpt.train.preparation import prepare
from tests.rlhf.cases import (
    logprobs,
    ppo_config,
    save_reward_model,
    scores,
    sequences,
    with_empty_responses,
)
from tests.rlhf.inline import comparable_metrics, make_ppo
from tests.rlhf.test_actor import assert_same_metrics, gathered, shifted, task
from tests.rlhf.test_ppo import NO_RULES, config_of

REWARD_FUNCTIONS = "tests.rlhf.rewards.given_functions"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ("ppo.rollout_batch_size=10",),
            r"rollout_batch_size=10 must be a multiple of global_batch_size=4; 8 or 12 would do",
        ),
        (
            ("ppo.global_batch_size=24",),
            r"rollout_batch_size=12 must be a multiple of global_batch_size=24; 24 would do",
        ),
        (
            ("pools.critic.num_workers=5",),
            r"ppo.global_batch_size=4 is less than pools.critic.num_workers=5",
        ),
        (
            ("pools.rollout.num_workers=13",),
            r"ppo.rollout_batch_size=12 is less than pools.rollout.num_workers=13",
        ),
        (
            ("pools.rollout.offload=true", "rollout.engine=vllm"),
            r"pools.rollout.offload=true: vLLM keeps .* or set rollout.engine=hf",
        ),
    ],
)
def test_batch_sizes_that_do_not_divide_are_refused_with_sizes_that_do(
    base, tmp_path, overrides, words
):
    with pytest.raises(ConfigError, match=words):
        ppo_config(tmp_path, base, *overrides)


def short_update(folder: Path, base: Path, num: int) -> dict[str, float]:
    """Metrics of actor and critic after an iteration of few sequences."""
    config, rollouts = ppo_config(folder, base), sequences(num)
    actor = Actor(config, total_iterations=1)
    critic = Critic(config, total_iterations=1)
    inputs = [
        [rollouts],
        [scores(rollouts)],
        gathered(critic.values(rollouts)),
        gathered(actor.logprobs(rollouts)),
        [logprobs(rollouts, shifted(rollouts))],
    ]
    return critic.update(task(), *inputs) | actor.update(task(), *inputs).metrics


@pytest.mark.parametrize(
    "num", [5, 1]
)  # the last step has one sequence; one sequence for two ranks
def test_the_last_prompts_of_an_epoch_may_be_fewer(base, tmp_path, two_ranks, num):
    one_rank_metrics = short_update(tmp_path, base, num)
    two_rank_metrics, _ = two_ranks(short_update, tmp_path, base, num)
    assert one_rank_metrics["ppo/steps"] == (4 if num == 5 else 2)
    assert_same_metrics(two_rank_metrics, one_rank_metrics)


@pytest.mark.ray
def test_prompts_over_the_limit_are_set_aside_and_counted(base, tmp_path, ray_session):
    rows = [{"prompt": "头痛怎么办?"}, {"prompt": "咳嗽" * 200}, {"prompt": "发热" * 100}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    source = (f"data.sources.0.paths=['{file}']", "data.sources.0.kind=prompt")
    options = (*source, "data.max_length=100", "data.validation_share=0.0")
    config = ppo_config(tmp_path, base, *options)
    run = Run.open("ppo", config, run_dir=config.run.dir, allow_changes=False)
    data, plan = prepare(run, config, lambda *_: None)
    assert data["sources"]["s"]["set_aside"] == {"prompt of N tokens > max_length N": 2}
    assert plan["epochs"][0]["num_rows"] == 1


@pytest.mark.parametrize("stage", [0, 3])
def test_a_critic_without_a_value_head_is_refused(base, tmp_path, stage):
    folder = save_reward_model(base, tmp_path / "critic")
    weights = load_file(folder / "model.safetensors")
    del weights[VALUE_HEAD_WEIGHT]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    options = (f"critic.model={folder}", f"pools.critic.engine.zero_stage={stage}")
    with pytest.raises(ConfigError, match=r"critic\.model=.*hold no score\.weight, the head"):
        Critic(ppo_config(tmp_path, base, *options), total_iterations=1)


@pytest.mark.parametrize("key", ["critic.model", "reward.model"])
def test_a_critic_with_another_tokenizer_is_refused(base, tmp_path, key):
    folder = save_reward_model(base, tmp_path / "critic")
    tokenizer = load_tokenizer(str(base))
    tokenizer.add_tokens(["偏头痛"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match=f"the actor and {key}=.*1 tokens have other ids"):
        Critic(ppo_config(tmp_path, base, f"{key}={folder}"), total_iterations=1)


def test_a_missing_critic_model_is_named_by_its_config_key(base, tmp_path):
    with pytest.raises(ConfigError, match=r"^critic\.model=.*none: the tokenizer cannot be loaded"):
        Critic(ppo_config(tmp_path, base, f"critic.model={tmp_path}/none"), total_iterations=1)


@pytest.mark.parametrize("function", ["raises", "one_short", "returns_none"])
def test_a_reward_that_always_fails_masks_all_and_halts_the_run(base, tmp_path, function):
    functions = f'reward.functions=[{{name="mine",path="{REWARD_FUNCTIONS}:{function}"}}]'
    config = ppo_config(tmp_path, base, NO_RULES, functions, "diagnosis.window=2")
    ppo = make_ppo(config, 5)
    before = {name: w.clone() for name, w in ppo.pools.pools["actor"].worker.weights()}
    with pytest.raises(Diverged, match="100% of the samples have no reward because mine failed"):
        ppo.fit()
    lines = comparable_metrics(ppo.run)
    assert [line["ppo/masked"] for line in lines] == [12, 12]
    assert [line["ppo/steps"] for line in lines] == [0, 0]
    for name, weight in ppo.pools.pools["actor"].worker.weights():
        assert (weight == before[name]).all(), name


def updates(folder: Path, base: Path, rollouts: Sequences, totals=None) -> dict[str, float]:
    """Metrics of actor and critic after an iteration on one rank."""
    config = ppo_config(folder, base)
    actor = Actor(config, total_iterations=1)
    critic = Critic(config, total_iterations=1)
    inputs = [
        [rollouts],
        [scores(rollouts, totals)],
        [critic.values(rollouts)],
        [actor.logprobs(rollouts)],
        [logprobs(rollouts, shifted(rollouts))],
    ]
    return critic.update(task(), *inputs) | actor.update(task(), *inputs).metrics


def test_empty_responses_are_counted_and_left_out_of_updates(base, tmp_path):
    rollouts = with_empty_responses(sequences(), 3, 7)
    metrics = updates(tmp_path, base, rollouts)
    assert metrics["rollout/empty"] == 2
    assert metrics["ppo/steps"] == 6
    totals = scores(rollouts).totals.copy()
    totals[[3, 7]] = np.nan  # as if they had no reward
    masked = updates(tmp_path, base, rollouts, totals)
    for name in ("actor/loss", "actor/grad_norm", "critic/loss", "critic/grad_norm"):
        assert metrics[name] == masked[name]
        assert np.isfinite(metrics[name])


def test_an_iteration_of_empty_responses_takes_no_step(base, tmp_path):
    rollouts = with_empty_responses(sequences(4), 0, 1, 2, 3)
    metrics = updates(tmp_path, base, rollouts)
    assert metrics["rollout/empty"] == 4
    assert metrics["ppo/steps"] == 0


def test_a_rollout_pool_with_stale_weights_ends_the_run(base, tmp_path):
    ppo = make_ppo(config_of(tmp_path, base), 3)
    sync = ppo.sync
    ppo.sync = lambda version: sync(version) if version < 1 else {}
    with pytest.raises(RuntimeError, match=r"has version 0 of the weights, not version 1;"):
        ppo.fit()
    assert len(ppo.run.metrics()) == 1


def test_a_rollout_pool_without_any_weights_ends_the_run(base, tmp_path):
    with pytest.raises(RuntimeError, match=r"has no full version of the weights, not version 0;"):
        make_ppo(config_of(tmp_path, base), 3, sync=lambda version: {}).fit()

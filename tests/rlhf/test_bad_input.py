"""Bad input to PPO gets a clear error, or samples that are masked and counted.

What is not here: reward models that read other ids (test_reward.py), pools larger than the cluster
(test_placement.py, train/test_capacity.py), models with too few
positions (test_stage.py), single functions that fail (rewards/test_functions.py).
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from medgpt.config.base import ConfigError
from medgpt.models.base import HEAD_KEY
from medgpt.models.tokenizer import load_base
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
    without_response,
)
from tests.rlhf.inline import driver, numbers
from tests.rlhf.test_actor import assert_same_metrics, gathered, shifted, task
from tests.rlhf.test_ppo import NO_RULES, config_of

GIVEN = "tests.rlhf.rewards.given_functions"


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
            r"ppo.global_batch_size=4 leaves some of pools.critic.num_workers=5 without work",
        ),
        (
            ("pools.rollout.num_workers=13",),
            r"ppo.rollout_batch_size=12 leaves some of pools.rollout.num_workers=13 without work",
        ),
        (
            ("pools.rollout.offload=true", "rollout.engine=vllm"),
            r"pools.rollout.offload=true: vLLM keeps .* or set rollout.engine=hf",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_some_that_do(base, tmp_path, overrides, words):
    with pytest.raises(ConfigError, match=words):
        ppo_config(tmp_path, base, *overrides)


def short_update(folder: Path, base: Path, num: int) -> dict[str, float]:
    """Metrics of actor and critic after an iteration of few sequences."""
    config, whole = ppo_config(folder, base), sequences(num)
    actor = Actor(config, total_iterations=1)
    critic = Critic(config, total_iterations=1)
    parts = [whole, scores(whole), *gathered(critic.values(whole))]
    parts += [*gathered(actor.logprobs(whole)), logprobs(whole, "reference", shifted(whole))]
    return critic.update(task(), *parts) | actor.update(task(), *parts).metrics


@pytest.mark.parametrize("num", [5, 1])  # a step of one sequence; one for two ranks
def test_the_last_prompts_of_an_epoch_may_be_fewer(base, tmp_path, two_ranks, num):
    alone = short_update(tmp_path, base, num)
    together, _ = two_ranks(short_update, tmp_path, base, num)
    assert alone["ppo/steps"] == (4 if num == 5 else 2)
    assert_same_metrics(together, alone)


@pytest.mark.ray
def test_longer_prompts_are_set_aside_and_counted(base, tmp_path, ray_session):
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
def test_a_critic_whose_head_is_gone_is_refused(base, tmp_path, stage):
    folder = save_reward_model(base, tmp_path / "critic")
    weights = load_file(folder / "model.safetensors")
    del weights[HEAD_KEY]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    options = (f"critic.model={folder}", f"pools.critic.engine.zero_stage={stage}")
    with pytest.raises(ConfigError, match=r"critic\.model=.*hold no score\.weight, the head"):
        Critic(ppo_config(tmp_path, base, *options), total_iterations=1)


@pytest.mark.parametrize("key", ["critic.model", "reward.model"])
def test_a_critic_that_reads_other_ids_is_refused(base, tmp_path, key):
    folder = save_reward_model(base, tmp_path / "critic")
    tokenizer = load_base(str(base))
    tokenizer.add_tokens(["偏头痛"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match=f"the actor and {key}=.*1 tokens have other ids"):
        Critic(ppo_config(tmp_path, base, f"{key}={folder}"), total_iterations=1)


def test_a_critic_that_is_not_there_is_told_with_its_key(base, tmp_path):
    with pytest.raises(ConfigError, match=r"^critic\.model=.*none: cannot load its tokenizer"):
        Critic(ppo_config(tmp_path, base, f"critic.model={tmp_path}/none"), total_iterations=1)


@pytest.mark.parametrize("function", ["raises", "one_short", "returns_none"])
def test_a_reward_that_always_fails_masks_all_and_halts_the_run(base, tmp_path, function):
    functions = f'reward.functions=[{{name="mine",path="{GIVEN}:{function}"}}]'
    config = ppo_config(tmp_path, base, NO_RULES, functions, "diagnosis.window=2")
    ppo = driver(config, 5)
    before = {name: w.clone() for name, w in ppo.pools.pools["actor"].worker.weights()}
    with pytest.raises(Diverged, match="100% of the samples have no reward because mine failed"):
        ppo.fit()
    lines = numbers(ppo.run)
    assert [line["ppo/masked"] for line in lines] == [12, 12]
    assert [line["ppo/steps"] for line in lines] == [0, 0]
    for name, weight in ppo.pools.pools["actor"].worker.weights():
        assert (weight == before[name]).all(), name


def updates(folder: Path, base: Path, whole: Sequences, totals=None) -> dict[str, float]:
    """Metrics of actor and critic after an iteration, both computing all parts."""
    config = ppo_config(folder, base)
    actor = Actor(config, total_iterations=1)
    critic = Critic(config, total_iterations=1)
    reference = logprobs(whole, "reference", shifted(whole))
    parts = [whole, scores(whole, totals), critic.values(whole), actor.logprobs(whole), reference]
    return critic.update(task(), *parts) | actor.update(task(), *parts).metrics


def test_an_empty_response_is_counted_and_takes_no_part(base, tmp_path):
    whole = without_response(sequences(), 3, 7)
    found = updates(tmp_path, base, whole)
    assert found["rollout/empty"] == 2
    assert found["ppo/steps"] == 6
    totals = scores(whole).totals.copy()
    totals[[3, 7]] = np.nan  # as if they had no reward
    masked = updates(tmp_path, base, whole, totals)
    for name in ("actor/loss", "actor/grad_norm", "critic/loss", "critic/grad_norm"):
        assert found[name] == masked[name]
        assert np.isfinite(found[name])


def test_an_iteration_of_empty_responses_changes_nothing(base, tmp_path):
    whole = without_response(sequences(4), 0, 1, 2, 3)
    found = updates(tmp_path, base, whole)
    assert found["rollout/empty"] == 4
    assert found["ppo/steps"] == 0


def test_a_rollout_pool_that_did_not_get_the_weights_ends_the_run(base, tmp_path):
    ppo = driver(config_of(tmp_path, base), 3)
    sync = ppo.sync
    ppo.sync = lambda version: sync(version) if version < 1 else {}
    with pytest.raises(RuntimeError, match=r"has version 0 of the weights, not version 1;"):
        ppo.fit()
    assert len(ppo.run.metrics()) == 1


def test_a_rollout_pool_without_any_weights_ends_the_run(base, tmp_path):
    with pytest.raises(RuntimeError, match=r"has no whole version of the weights, not version 0;"):
        driver(config_of(tmp_path, base), 3, sync=lambda version: {}).fit()

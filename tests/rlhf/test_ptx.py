"""PPO-ptx: its stream, its loss in the actor's steps, and resume."""

from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from medgpt.artifacts import committed
from medgpt.config.base import ConfigError
from medgpt.config.ppo import PPOStageConfig
from medgpt.data.loader.plan import Plan
from medgpt.engine.export import gather_weights
from medgpt.rlhf.ptx import prepare_ptx, ptx_run, ptx_stream
from medgpt.rlhf.roles.actor import Actor
from medgpt.runs import Run
from tests.rlhf.cases import PTX, ppo_config, ptx_batch, sequences
from tests.rlhf.inline import comparable_metrics, make_ppo
from tests.rlhf.test_actor import (
    ITERATIONS,
    assert_same,
    assert_same_metrics,
    plain_torch,
    train,
)
from tests.rlhf.test_ppo import config_of, stop_at

SIZES = (3, 1, 5, 3, 2, 3)  # rows of the six steps of an iteration


def rank_update(folder: Path, base: Path, *overrides: str) -> tuple[dict[str, float], dict]:
    """Metrics and weights after an iteration with a PtxBatch on this process's ranks."""
    actor = Actor(ppo_config(folder, base, PTX, *overrides), total_iterations=ITERATIONS)
    metrics = train(actor, sequences(), ptx=ptx_batch(*SIZES))
    return metrics, {name: weight.numpy() for name, weight in gather_weights(actor.policy.model)}


@pytest.fixture(scope="module")
def one_rank(base, tmp_path_factory):
    """The update on one rank without ZeRO."""
    return rank_update(tmp_path_factory.mktemp("one"), base)


def ptx_loss(model, rows) -> torch.Tensor:
    """Mean loss over the target tokens of all rows, by Hugging Face on each sequence alone."""
    total, count = torch.zeros(()), 0
    for row in rows:
        bounds = np.append(0, np.cumsum(row.lengths))
        for start, stop in pairwise(bounds):
            ids = torch.from_numpy(row.input_ids[start:stop]).long()[None]
            labels = torch.from_numpy(row.targets[start:stop])[None]
            labels[:, 0] = False  # nothing predicts the first token
            num = int(labels.sum())
            total = total + num * model(input_ids=ids, labels=ids.where(labels, -100)).loss
            count += num
    return total / count


def test_a_step_adds_the_gradients_of_ppo_and_ptx_losses(base, tmp_path, one_rank):
    batch, losses = ptx_batch(*SIZES), []

    def ptx_loss_of(model, number: int) -> torch.Tensor:
        loss = ptx_loss(model, batch.steps[number])
        losses.append(loss.item())
        return 0.5 * loss

    loss, weights = plain_torch(ppo_config(tmp_path, base, PTX), base, ptx_loss_of)
    metrics, actual_weights = one_rank
    assert metrics["actor/loss"] == pytest.approx(loss, abs=1e-5)
    assert metrics["actor/ptx_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert_same(actual_weights, weights, atol=1e-5)


@pytest.mark.parametrize("budget", [1, 10_000])
def test_micro_batches_change_nothing(base, tmp_path, one_rank, budget):
    metrics, weights = rank_update(tmp_path, base, f"ppo.micro_batch_tokens={budget}")
    assert_same_metrics(metrics, one_rank[0])
    assert_same(weights, one_rank[1], atol=2e-5)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_ranks_agree_with_one(base, tmp_path, one_rank, two_ranks, stage):
    override = f"pools.actor.engine.zero_stage={stage}"
    (metrics, weights), (others, _) = two_ranks(rank_update, tmp_path, base, override)
    assert one_rank[0]["actor/ptx_loss"] > 1
    assert_same_metrics(metrics, one_rank[0])
    assert_same_metrics(others, one_rank[0])
    assert_same(weights, one_rank[1], atol=2e-5)


def ptx_stream_of(start: int):
    """PtxBatches from iteration `start` on."""
    number = start
    while True:
        yield ptx_batch(*SIZES, seed=number % 2)
        number += 1


def test_the_ptx_loss_falls_and_resumes_with_the_same_rows(base, tmp_path):
    config = config_of(tmp_path / "whole", base, PTX, "ppo.checkpoint_every=2")
    full_run = make_ppo(config, 6, ptx=ptx_stream_of)
    full_run.fit()
    losses = [line["actor/ptx_loss"] for line in comparable_metrics(full_run.run)]
    assert losses[4] < losses[0] - 0.2  # the same rows

    config = config_of(tmp_path / "killed", base, PTX, "ppo.checkpoint_every=2")
    stop_at(5, make_ppo(config, 6, ptx=ptx_stream_of))
    resumed = make_ppo(config, 6, ptx=ptx_stream_of)
    resumed.fit()
    assert comparable_metrics(resumed.run) == comparable_metrics(full_run.run)


def test_a_rebuilt_pool_gets_the_same_ptx_batch_again(base, tmp_path):
    runs = []
    for name, death in (("whole", None), ("died", ("update", 3))):
        config = config_of(tmp_path / name, base, PTX, "ppo.checkpoint_every=2")
        ppo = make_ppo(config, 3, ptx=ptx_stream_of)
        ppo.pools.pools["actor"].dies_at = death
        ppo.fit()
        runs.append(comparable_metrics(ppo.run))
    assert runs[0] == runs[1]


def test_there_is_no_ptx_loss_while_the_critic_warms_up(base, tmp_path):
    ppo = make_ppo(
        config_of(tmp_path, base, PTX, "critic.warmup_iterations=1"), 2, ptx=ptx_stream_of
    )
    ppo.fit()
    first, second = comparable_metrics(ppo.run)
    assert "actor/ptx_loss" not in first
    assert second["actor/ptx_loss"] > 0


def with_ptx(folder: Path, base: Path, data: Path, *overrides: str) -> PPOStageConfig:
    """An iteration has six steps of four rows."""
    source = f"{{name='talk',paths=['{data}'],license='-'}}"
    ptx = f"ptx={{batch_size=4,data={{max_length=256,sources=[{source}]}}}}"
    return ppo_config(folder, base, ptx, *overrides)


def ids(steps: list[list]) -> list[list[tuple]]:
    return [[tuple(zip(r.sample_ids, r.chunks, strict=True)) for r in rows] for rows in steps]


@pytest.mark.ray
def test_the_ptx_stream_has_its_own_plan_and_starts_at_any_iteration(
    base, tmp_path, tiny_corpus, ray_session
):
    config = with_ptx(tmp_path, base, tiny_corpus / "sft")
    run = Run.open("ppo", config, run_dir=config.run.dir, allow_changes=False)
    prepare_ptx(run, config, 5, lambda *_: None)
    folder_run = ptx_run(run)
    assert folder_run.folder.url == f"{run.folder.url}/ptx"
    plan = Plan(folder_run.plan.url, global_batch_size=4, max_steps=None)
    assert plan.num_steps >= 30

    iterations = list(islice(ptx_stream(run, config, 0, say=print), 5))
    assert all(len(part.steps) == 6 for part in iterations)
    flat = [row for part in iterations for step in ids(part.steps) for row in step]
    first_epoch = flat[: plan.num_rows[0]]
    assert len(set(first_epoch)) == len(first_epoch) == plan.num_rows[0]
    (resumed,) = islice(ptx_stream(run, config, 3, say=print), 1)
    assert ids(resumed.steps) == ids(iterations[3].steps)
    row = resumed.steps[0][0]
    np.testing.assert_array_equal(row.input_ids, iterations[3].steps[0][0].input_ids)
    assert row.targets.any()
    assert not row.targets.all()

    before = committed(folder_run.plan)
    prepare_ptx(run, config, 5, lambda *_: None)
    assert committed(folder_run.plan) == before


@pytest.mark.ray
@pytest.mark.parametrize(
    ("paths", "max_length", "words"),
    [
        ("sft", 1024, r"\[ptx\] data.max_length=1024 exceeds the model's 512 positions"),
        ("nowhere", 256, r"\[ptx\] data.sources talk paths="),
        ("pretrain", 256, r"\[ptx\] data.sources talk: 300 of 300 rows are malformed"),
    ],
)
def test_bad_ptx_conversations_raise_config_errors_for_ptx(
    base, tmp_path, tiny_corpus, ray_session, paths, max_length, words
):
    override = f"ptx.data.max_length={max_length}"
    config = with_ptx(tmp_path, base, tiny_corpus / paths, override)
    run = Run.open("ppo", config, run_dir=config.run.dir, allow_changes=False)
    with pytest.raises(ConfigError, match=words):
        prepare_ptx(run, config, 5, lambda *_: None)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("ptx.coef=0.7", r"ptx\.coef was 1\.0, is 0\.7"),
        ("ptx.data.max_length=128", r"ptx\.data\.max_length was 256, is 128"),
        ("ptx.data.sources.0.paths=['/other']", r"ptx\.data\.sources\.0\.paths was"),
    ],
)
def test_a_run_cannot_change_its_ptx_config(base, tmp_path, override, words):
    def open_run(*overrides: str) -> Run:
        config = with_ptx(tmp_path, base, tmp_path, *overrides)
        return Run.open("ppo", config, run_dir=config.run.dir, allow_changes=False)

    open_run()
    open_run("ptx.data.max_malformed_share=0.5")
    with pytest.raises(ConfigError, match=words):
        open_run(override)

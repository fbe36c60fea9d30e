"""The critic's values and update against plain torch; ranks, ZeRO, resume."""

from pathlib import Path

import numpy as np
import pytest
import torch

from medgpt.algos.ppo import ppo_value_loss
from medgpt.engine import gather_weights
from medgpt.engine.schedule import learning_rate
from medgpt.models.value_model import load_value_model
from medgpt.rlhf.batching import response_batch
from medgpt.rlhf.experience import Parts, RunningStats, assign_credit
from medgpt.rlhf.roles.common import step_rows
from medgpt.rlhf.roles.critic import Critic
from tests.rlhf.cases import logprobs, ppo_config, save_reward_model, scores, sequences
from tests.rlhf.test_actor import (
    ENGINES,
    ITERATIONS,
    assert_same,
    assert_same_metrics,
    gathered,
    shifted,
    task,
)


def parts_of(critic: Critic, whole) -> list:
    reference = logprobs(whole, "reference", shifted(whole))
    values = gathered(critic.values(whole))
    return [whole, scores(whole), *values, logprobs(whole, "actor"), reference]


def rank_update(folder: Path, base: Path, *overrides: str) -> tuple[dict[str, float], dict]:
    """Metrics and weights after an iteration on this process's ranks."""
    critic = Critic(ppo_config(folder, base, *overrides), total_iterations=ITERATIONS)
    metrics = critic.update(task(), *parts_of(critic, sequences()))
    return metrics, {name: weight.numpy() for name, weight in gather_weights(critic.model.model)}


@pytest.fixture(scope="module")
def one_rank(base, tmp_path_factory):
    """The update on one rank without ZeRO."""
    return rank_update(tmp_path_factory.mktemp("one"), base)


def values_alone(model, whole, row: int) -> torch.Tensor:
    """(t + 1,) before each response token and after the last, of this sequence alone."""
    length = len(whole.responses.row(row))
    return model(response_batch(whole, np.array([row])))[0, -length - 1 :]


def test_values_are_read_before_each_token_and_after_the_last(base, tmp_path):
    critic, whole = Critic(ppo_config(tmp_path, base), total_iterations=1), sequences()
    found = critic.values(whole)
    with torch.no_grad():
        want = [values_alone(critic.model, whole, row) for row in found.index]
    np.testing.assert_allclose(found.values, torch.cat([v[:-1] for v in want]), atol=1e-5)
    np.testing.assert_allclose(found.after, torch.stack([v[-1] for v in want]), atol=1e-5)


@pytest.mark.parametrize("clip", [0.2, 0.01])
def test_an_iteration_is_what_plain_torch_does_sequence_by_sequence(base, tmp_path, one_rank, clip):
    override = f"critic.value_clip_range={clip}"
    config, whole = ppo_config(tmp_path, base, override), sequences()
    critic = Critic(config, total_iterations=ITERATIONS)
    parts = Parts.of(parts_of(critic, whole))
    experience = assign_credit(parts, config.ppo, kl_coef=0.1, score_stats=RunningStats())
    model, losses = critic.model, []
    adam = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    steps = list(step_rows(experience, config, 0))
    for number, rows in enumerate(steps):
        loss = torch.zeros(())
        for row in rows:
            places = whole.responses.places([row])
            new = values_alone(model, whole, row)[None, :-1]
            old, returns = (x[places][None] for x in (experience.values, experience.returns))
            mask = torch.ones_like(new, dtype=torch.bool)
            num_tokens = int(whole.responses.lengths[rows].sum())
            options = {"clip_range": clip, "num_tokens": num_tokens}
            loss = loss + ppo_value_loss(new, old, returns, mask, **options).loss
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in adam.param_groups:
            group["lr"] = learning_rate(number, ITERATIONS * len(steps), config.critic.optimizer)
        adam.step()
        losses.append(loss.item())

    metrics, found = one_rank if clip == 0.2 else rank_update(tmp_path, base, override)
    assert metrics["critic/loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    want = {name: p.detach().numpy() for name, p in model.model.named_parameters()}
    assert_same(found, want, atol=1e-5)
    assert (metrics["critic/clip_frac"] > 0.5) == (clip == 0.01)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_agree_with_one_at_every_zero_stage(base, tmp_path, one_rank, two_ranks, engine):
    override = f"pools.critic.engine={engine}"
    (metrics, weights), (others, _) = two_ranks(rank_update, tmp_path, base, override)
    assert_same_metrics(metrics, one_rank[0])
    assert_same_metrics(others, one_rank[0])
    assert_same(weights, one_rank[1], atol=2e-5)


def nan_update(folder: Path, base: Path, *overrides: str) -> tuple[dict[str, float], float]:
    """Metrics of an iteration in which no step is finite, and how far a weight moved."""
    critic, whole = Critic(ppo_config(folder, base, *overrides), total_iterations=1), sequences()
    before = dict(gather_weights(critic.model.model))
    metrics = critic.update(task(kl_coef=np.inf), *parts_of(critic, whole))
    after = dict(gather_weights(critic.model.model))
    return metrics, max((float((after[n] - w).abs().max()) for n, w in before.items()), default=0.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_where_no_step_is_finite_no_weight_moves(base, tmp_path, two_ranks, engine):
    found = two_ranks(nan_update, tmp_path, base, f"pools.critic.engine={engine}")
    for metrics, moved in found:
        assert moved == 0
        assert metrics["critic/skipped_steps"] == metrics["critic/steps"] == 6
        assert np.isnan(metrics["critic/grad_norm"])
        assert metrics["critic/loss"] == 0  # of no step


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "adapters"])
def test_a_critic_starts_as_the_reward_model_and_comes_back_as_it_was(base, tmp_path, lora, stage):
    reward = save_reward_model(base, tmp_path / "reward", lora=lora)
    options = (f"reward.model={reward}", f"pools.critic.engine.zero_stage={stage}")
    critic, whole = Critic(ppo_config(tmp_path, base, *options), total_iterations=2), sequences()
    scorer, _ = load_value_model(str(reward))
    with torch.no_grad():
        found = critic.values(whole)
        want = [values_alone(scorer, whole, row)[-1] for row in found.index]
    np.testing.assert_allclose(found.after, torch.stack(want), atol=1e-5)

    critic.update(task(), *parts_of(critic, whole))
    learnt = critic.values(whole).values
    files = {file.name for file in critic.export(str(tmp_path / "critic"))}
    assert {"value.json", "config.json", "model.safetensors", "tokenizer.json"} <= files
    again = Critic(
        ppo_config(tmp_path, base, *options, f"critic.model={tmp_path / 'critic'}"),
        total_iterations=1,
    )
    np.testing.assert_allclose(again.values(whole).values, learnt, atol=1e-5)


def test_adapters_of_a_critic_on_adapters_of_a_reward_model_come_back(base, tmp_path):
    reward = save_reward_model(base, tmp_path / "reward", lora=True)
    lora = (f"reward.model={reward}", "critic.lora.rank=2")
    critic, whole = Critic(ppo_config(tmp_path, base, *lora), total_iterations=2), sequences()
    critic.update(task(), *parts_of(critic, whole))
    learnt = critic.values(whole).values
    critic.export(str(tmp_path / "critic"))
    start = f"critic.model={tmp_path / 'critic'}"
    again = Critic(ppo_config(tmp_path, base, start), total_iterations=1)
    np.testing.assert_allclose(again.values(whole).values, learnt, atol=1e-5)


def test_a_saved_critic_continues_as_if_it_had_not_stopped(base, tmp_path):
    config, second = ppo_config(tmp_path, base), sequences(seed=1)
    critic = Critic(config, total_iterations=ITERATIONS)
    critic.update(task(), *parts_of(critic, sequences()))
    critic.save(str(tmp_path / "checkpoint"))
    went_on = critic.update(task(iteration=1), *parts_of(critic, second))

    again = Critic(config, total_iterations=ITERATIONS)
    again.load(str(tmp_path / "checkpoint"))
    assert again.update(task(iteration=1), *parts_of(again, second)) == went_on

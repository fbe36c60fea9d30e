"""The critic's values and update against plain torch; ranks, ZeRO, resume."""

from pathlib import Path

import numpy as np
import pytest
import torch

from medgpt.algos.ppo import ppo_value_loss
from medgpt.engine.export import gather_weights
from medgpt.engine.schedule import learning_rate
from medgpt.models.value_model import load_value_model
from medgpt.rlhf.batching import response_batch
from medgpt.rlhf.experience import RunningStats, make_experience
from medgpt.rlhf.roles.common import optimizer_step_rows
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


def inputs_of(critic: Critic, rollouts) -> list[list]:
    reference = logprobs(rollouts, shifted(rollouts))
    values = gathered(critic.values(rollouts))
    return [[rollouts], [scores(rollouts)], values, [logprobs(rollouts)], [reference]]


def rank_update(folder: Path, base: Path, *overrides: str) -> tuple[dict[str, float], dict]:
    """Metrics and weights after an iteration on this process's ranks."""
    critic = Critic(ppo_config(folder, base, *overrides), total_iterations=ITERATIONS)
    metrics = critic.update(task(), *inputs_of(critic, sequences()))
    return metrics, {name: weight.numpy() for name, weight in gather_weights(critic.model.model)}


@pytest.fixture(scope="module")
def one_rank(base, tmp_path_factory):
    """The update on one rank without ZeRO."""
    return rank_update(tmp_path_factory.mktemp("one"), base)


def values_alone(model, rollouts, row: int) -> torch.Tensor:
    """(t + 1,) values of a single sequence, before each response token and after the last."""
    length = len(rollouts.responses.row(row))
    return model(response_batch(rollouts, np.array([row])))[0, -length - 1 :]


def test_values_are_read_before_each_token_and_after_the_last(base, tmp_path):
    critic, rollouts = Critic(ppo_config(tmp_path, base), total_iterations=1), sequences()
    actual = critic.values(rollouts)
    with torch.no_grad():
        expected = [values_alone(critic.model, rollouts, row) for row in actual.index]
    np.testing.assert_allclose(actual.values, torch.cat([v[:-1] for v in expected]), atol=1e-5)
    np.testing.assert_allclose(actual.bootstrap, torch.stack([v[-1] for v in expected]), atol=1e-5)


@pytest.mark.parametrize("clip", [0.2, 0.01])
def test_an_update_equals_plain_torch_sequence_by_sequence(base, tmp_path, one_rank, clip):
    override = f"critic.value_clip_range={clip}"
    config, rollouts = ppo_config(tmp_path, base, override), sequences()
    critic = Critic(config, total_iterations=ITERATIONS)
    experience = make_experience(
        *inputs_of(critic, rollouts),
        config=config.ppo,
        kl_coef=0.1,
        score_stats=RunningStats(),
    )
    model, losses = critic.model, []
    adam = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    steps = list(optimizer_step_rows(experience, config, 0))
    for number, rows in enumerate(steps):
        loss = torch.zeros(())
        for row in rows:
            positions = rollouts.responses.positions([row])
            new = values_alone(model, rollouts, row)[None, :-1]
            old, returns = (x[positions][None] for x in (experience.values, experience.returns))
            mask = torch.ones_like(new, dtype=torch.bool)
            num_tokens = int(rollouts.responses.lengths[rows].sum())
            options = {"clip_range": clip, "num_tokens": num_tokens}
            loss = loss + ppo_value_loss(new, old, returns, mask, **options).loss
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in adam.param_groups:
            group["lr"] = learning_rate(number, ITERATIONS * len(steps), config.critic.optimizer)
        adam.step()
        losses.append(loss.item())

    metrics, actual = one_rank if clip == 0.2 else rank_update(tmp_path, base, override)
    assert metrics["critic/loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    expected = {name: p.detach().numpy() for name, p in model.model.named_parameters()}
    assert_same(actual, expected, atol=1e-5)
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
    critic, rollouts = Critic(ppo_config(folder, base, *overrides), total_iterations=1), sequences()
    before = dict(gather_weights(critic.model.model))
    metrics = critic.update(task(kl_coef=np.inf), *inputs_of(critic, rollouts))
    after = dict(gather_weights(critic.model.model))
    return metrics, max((float((after[n] - w).abs().max()) for n, w in before.items()), default=0.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_where_no_step_is_finite_no_weight_moves(base, tmp_path, two_ranks, engine):
    actual = two_ranks(nan_update, tmp_path, base, f"pools.critic.engine={engine}")
    for metrics, moved in actual:
        assert moved == 0
        assert metrics["critic/skipped_steps"] == metrics["critic/steps"] == 6
        assert np.isnan(metrics["critic/grad_norm"])
        assert metrics["critic/loss"] == 0  # no step was made


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "adapters"])
def test_a_critic_starts_from_the_reward_model_and_reloads_after_export(
    base, tmp_path, lora, stage
):
    reward = save_reward_model(base, tmp_path / "reward", lora=lora)
    options = (f"reward.model={reward}", f"pools.critic.engine.zero_stage={stage}")
    critic, rollouts = Critic(ppo_config(tmp_path, base, *options), total_iterations=2), sequences()
    scorer, _ = load_value_model(str(reward))
    with torch.no_grad():
        actual = critic.values(rollouts)
        expected = [values_alone(scorer, rollouts, row)[-1] for row in actual.index]
    np.testing.assert_allclose(actual.bootstrap, torch.stack(expected), atol=1e-5)

    critic.update(task(), *inputs_of(critic, rollouts))
    updated = critic.values(rollouts).values
    files = {file.name for file in critic.export(str(tmp_path / "critic"))}
    assert {"value.json", "config.json", "model.safetensors", "tokenizer.json"} <= files
    restored = Critic(
        ppo_config(tmp_path, base, *options, f"critic.model={tmp_path / 'critic'}"),
        total_iterations=1,
    )
    np.testing.assert_allclose(restored.values(rollouts).values, updated, atol=1e-5)


def test_critic_adapters_on_a_lora_reward_model_reload_after_export(base, tmp_path):
    reward = save_reward_model(base, tmp_path / "reward", lora=True)
    lora = (f"reward.model={reward}", "critic.lora.rank=2")
    critic, rollouts = Critic(ppo_config(tmp_path, base, *lora), total_iterations=2), sequences()
    critic.update(task(), *inputs_of(critic, rollouts))
    updated = critic.values(rollouts).values
    critic.export(str(tmp_path / "critic"))
    start = f"critic.model={tmp_path / 'critic'}"
    restored = Critic(ppo_config(tmp_path, base, start), total_iterations=1)
    np.testing.assert_allclose(restored.values(rollouts).values, updated, atol=1e-5)


def test_a_saved_critic_continues_as_if_it_had_not_stopped(base, tmp_path):
    config, second = ppo_config(tmp_path, base), sequences(seed=1)
    critic = Critic(config, total_iterations=ITERATIONS)
    critic.update(task(), *inputs_of(critic, sequences()))
    critic.save(str(tmp_path / "checkpoint"))
    uninterrupted = critic.update(task(iteration=1), *inputs_of(critic, second))

    restored = Critic(config, total_iterations=ITERATIONS)
    restored.load(str(tmp_path / "checkpoint"))
    assert restored.update(task(iteration=1), *inputs_of(restored, second)) == uninterrupted

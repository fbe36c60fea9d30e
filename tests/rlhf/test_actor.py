"""The actor's update equals plain torch on single sequences, on any ranks and ZeRO stages."""

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from medgpt.algos.ppo import ppo_policy_loss
from medgpt.config.ppo import PPOStageConfig
from medgpt.engine.export import gather_weights
from medgpt.engine.schedule import learning_rate
from medgpt.rlhf.experience import RunningStats, make_experience
from medgpt.rlhf.roles.actor import Actor
from medgpt.rlhf.roles.common import UpdateTask, optimizer_step_rows
from medgpt.rlhf.roles.reference import Reference
from medgpt.rlhf.roles.rollout import HuggingFaceEngine, Rollout
from medgpt.rlhf.rollout_batch import PtxBatch, Sequences, join_per_token
from tests.rlhf.cases import logprobs, ppo_config, scores, sequences, share, values

ITERATIONS = 3
ENGINES = (
    "{zero_stage=0}",
    "{zero_stage=1}",
    "{zero_stage=2}",
    "{zero_stage=3}",
    "{zero_stage=1,offload_optimizer=true}",
    "{zero_stage=2,offload_optimizer=true}",
    "{zero_stage=3,offload_optimizer=true}",
)


def task(iteration: int = 0, **changes) -> UpdateTask:
    options = {"weight_version": 0, "kl_coef": 0.1, "score_stats": RunningStats()}
    return UpdateTask(**{**options, "iteration": iteration, "update_actor": True, **changes})


def distributions(model, rollouts: Sequences, row: int, temperature: float) -> torch.Tensor:
    """(t, V) log-probabilities before each token of a row's response, by Hugging Face's own forward
    on this sequence alone."""
    prompt, response = rollouts.prompts.row(row), rollouts.responses.row(row)
    ids = torch.tensor(np.concatenate([prompt, response]))[None].long()
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1)


def response_logprobs(model, rollouts: Sequences, row: int, temperature: float) -> torch.Tensor:
    """(t,) log-probabilities of a row's response tokens."""
    response = torch.from_numpy(rollouts.responses.row(row)).long()[:, None]
    return distributions(model, rollouts, row, temperature).gather(1, response)[:, 0]


def train(
    actor: Actor, rollouts: Sequences, value=None, *, ptx: PtxBatch | None = None, **changes
) -> dict[str, float]:
    """Run one update with the actor's own old log-probabilities and a shifted reference."""
    old = gathered(actor.logprobs(rollouts))
    reference = logprobs(rollouts, shifted(rollouts))
    inputs = [[rollouts], [scores(rollouts)], [values(rollouts, value)], old, [reference]]
    return actor.update(task(**changes), *inputs, ptx).metrics


def shifted(rollouts: Sequences) -> np.ndarray:
    return rollouts.logprobs + np.random.default_rng(5).normal(0, 0.1, len(rollouts.logprobs))


def gathered(part) -> list:
    """Gather the outputs of all ranks."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return parts


def rank_update(folder: Path, base: Path, *overrides: str) -> tuple[dict[str, float], dict]:
    """Metrics and weights after an iteration on this process's ranks."""
    actor = Actor(ppo_config(folder, base, *overrides), total_iterations=ITERATIONS)
    metrics = train(actor, sequences())
    weights = {name: weight.numpy() for name, weight in gather_weights(actor.policy.model)}
    return metrics, weights


def plain_torch(
    config: PPOStageConfig, base: Path, ptx: Callable[[Any, int], torch.Tensor] | None = None
) -> tuple[float, dict]:
    """Mean loss and weights after the same iteration; `ptx` adds a loss to each step."""
    rollouts = sequences()
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa").train()
    temperature = config.rollout.temperature
    with torch.no_grad():
        old = [response_logprobs(model, rollouts, row, temperature) for row in range(len(rollouts))]
    experience = make_experience(
        [rollouts],
        [scores(rollouts)],
        [values(rollouts)],
        [logprobs(rollouts, torch.cat(old))],
        [logprobs(rollouts, shifted(rollouts))],
        config=config.ppo,
        kl_coef=0.1,
        score_stats=RunningStats(),
    )
    adam = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), eps=config.optimizer.eps, weight_decay=0.0
    )
    losses, ppo = [], config.ppo
    steps = list(optimizer_step_rows(experience, config, 0))
    for number, rows in enumerate(steps):
        num_tokens = int(rollouts.responses.lengths[rows].sum())
        loss, bonus = torch.zeros(()), torch.zeros(())
        for row in rows:
            positions = rollouts.responses.positions([row])
            all_tokens = distributions(model, rollouts, row, temperature)
            chosen = torch.from_numpy(rollouts.responses.row(row)).long()[:, None]
            new = all_tokens.gather(1, chosen).T
            weights = experience.importance_weights
            policy = ppo_policy_loss(
                new,
                old[row][None],
                experience.advantages[positions][None],
                torch.ones_like(new, dtype=torch.bool),
                clip_range=ppo.clip_range,
                clip_range_high=ppo.clip_range_high,
                dual_clip=ppo.dual_clip,
                weights=None if weights is None else weights[positions][None],
                num_tokens=num_tokens,
            )
            entropy = -(all_tokens.exp() * all_tokens).sum()
            loss = loss + policy.loss
            bonus = bonus + entropy / num_tokens
        adam.zero_grad()
        total = loss - ppo.entropy_coef * bonus
        (total if ptx is None else total + ptx(model, number)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
        for group in adam.param_groups:
            group["lr"] = learning_rate(number, ITERATIONS * len(steps), config.optimizer)
        adam.step()
        losses.append(loss.item())
    return float(np.mean(losses)), {n: p.detach().numpy() for n, p in model.named_parameters()}


def assert_same(actual: dict, expected: dict, atol: float) -> None:
    assert expected
    for name, weight in expected.items():
        np.testing.assert_allclose(actual[name], weight, atol=atol, rtol=0, err_msg=name)


def assert_same_metrics(actual: dict[str, float], expected: dict[str, float]) -> None:
    for name in expected:
        assert actual[name] == pytest.approx(expected[name], abs=1e-4), name


@pytest.fixture(scope="module")
def one_rank(base, tmp_path_factory):
    """The update on one rank without ZeRO."""
    return rank_update(tmp_path_factory.mktemp("one"), base)


def test_packed_logprobs_equal_those_of_single_sequences_at_the_temperature(base, tmp_path):
    config = ppo_config(tmp_path, base, "rollout.temperature=0.7")
    rollouts = sequences()
    actual = Actor(config, total_iterations=1).logprobs(
        share(rollouts, range(6)), share(rollouts, range(6, 12))
    )

    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa").eval()
    with torch.no_grad():
        expected = torch.cat([response_logprobs(model, rollouts, row, 0.7) for row in actual.index])
    np.testing.assert_allclose(actual.values, expected, atol=1e-5)
    assert actual.entropy > 0


def test_an_update_equals_plain_torch_sequence_by_sequence(base, tmp_path, one_rank):
    loss, weights = plain_torch(ppo_config(tmp_path, base), base)
    metrics, actual = one_rank
    assert metrics["actor/loss"] == pytest.approx(loss, abs=1e-5)
    assert metrics["ppo/steps"] == 6
    assert_same(actual, weights, atol=1e-5)
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert any(np.abs(actual[name] - before[name].numpy()).max() > 1e-3 for name in actual)


@pytest.mark.parametrize("budget", [1, 10_000])
def test_micro_batches_change_nothing(base, tmp_path, one_rank, budget):
    metrics, weights = rank_update(tmp_path, base, f"ppo.micro_batch_tokens={budget}")
    assert_same_metrics(metrics, one_rank[0])
    assert_same(weights, one_rank[1], atol=2e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_agree_with_one_at_every_zero_stage(base, tmp_path, one_rank, two_ranks, engine):
    override = f"pools.actor.engine={engine}"
    (metrics, weights), (others, _) = two_ranks(rank_update, tmp_path, base, override)
    assert_same_metrics(metrics, one_rank[0])
    assert_same_metrics(others, one_rank[0])
    assert_same(weights, one_rank[1], atol=2e-5)


def test_a_saved_actor_continues_as_if_it_had_not_stopped(base, tmp_path):
    config = ppo_config(tmp_path, base)
    actor = Actor(config, total_iterations=ITERATIONS)
    train(actor, sequences())
    files = actor.save(str(tmp_path / "checkpoint"))
    uninterrupted = train(actor, sequences(seed=1), iteration=1)

    restored = Actor(config, total_iterations=ITERATIONS)
    restored.load(str(tmp_path / "checkpoint"))
    assert train(restored, sequences(seed=1), iteration=1) == uninterrupted
    assert {file.name for file in files} == {p.name for p in (tmp_path / "checkpoint").iterdir()}


def test_steps_that_are_not_finite_are_skipped_and_counted(base, tmp_path):
    actor = Actor(ppo_config(tmp_path, base, "ppo.micro_batch_tokens=1000"), total_iterations=1)
    before = {name: p.clone() for name, p in actor.policy.named_parameters()}
    weight, backwards = actor.policy.model.get_input_embeddings().weight, count()
    weight.register_hook(lambda grad: grad * (np.inf if next(backwards) in (1, 4) else 1))
    metrics = train(actor, sequences())

    assert metrics["ppo/skipped_steps"] == 2  # one forward and backward each
    assert metrics["ppo/steps"] == next(backwards) == 6
    assert np.isfinite(metrics["actor/loss"])
    assert all(p.isfinite().all() for p in actor.policy.parameters())
    assert any((p != before[name]).any() for name, p in actor.policy.named_parameters())


def nan_update(folder: Path, base: Path, *overrides: str) -> tuple[dict[str, float], float]:
    """Metrics of an iteration in which no step is finite, and how far a weight moved."""
    config = ppo_config(folder, base, "ppo.whiten_advantages=false", *overrides)
    actor, rollouts = Actor(config, total_iterations=1), sequences()
    before = dict(gather_weights(actor.policy.model))
    metrics = train(actor, rollouts, kl_coef=np.inf)
    after = dict(gather_weights(actor.policy.model))
    return metrics, max((float((after[n] - w).abs().max()) for n, w in before.items()), default=0.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_where_no_step_is_finite_no_weight_moves(base, tmp_path, two_ranks, engine):
    actual = two_ranks(nan_update, tmp_path, base, f"pools.actor.engine={engine}")
    for metrics, moved in actual:
        assert moved == 0
        assert metrics["ppo/skipped_steps"] == metrics["ppo/steps"] == 6
        assert np.isnan(metrics["actor/grad_norm"])
        assert metrics["actor/loss"] == 0  # no step was made


@pytest.mark.parametrize("part", ["value", "reference", "old"])
def test_a_sequence_with_nonfinite_numbers_is_left_out_of_the_update(base, tmp_path, part):
    """With whitening, one such token would make every advantage of the batch nan."""
    rollouts, bad = sequences(), {"value": np.inf, "reference": np.nan, "old": -np.inf}
    actual = []
    for number in (bad[part], None):
        actor = Actor(ppo_config(tmp_path, base), total_iterations=1)
        numbers = {
            "value": values(rollouts).values,
            "reference": shifted(rollouts),
            "old": join_per_token([actor.logprobs(rollouts)], rollouts.responses),
        }
        totals = scores(rollouts).totals.copy()
        if number is None:
            totals[0] = np.nan  # the same sequence, left out because its reward failed
        else:
            numbers[part] = numbers[part].copy()
            numbers[part][0] = number
        metrics = actor.update(
            task(),
            [rollouts],
            [scores(rollouts, totals)],
            [values(rollouts, numbers["value"])],
            [logprobs(rollouts, numbers["old"])],
            [logprobs(rollouts, numbers["reference"])],
        ).metrics
        assert metrics["ppo/steps"] == 6
        assert metrics["ppo/skipped_steps"] == 0
        assert metrics["ppo/not_finite"] == pytest.approx(0 if number is None else 1 / 12)
        actual.append({name: p.detach().numpy() for name, p in actor.policy.named_parameters()})
    assert_same(*actual, atol=1e-6)


def test_lora_adapters_reach_the_rollout_engine_merged(base, tmp_path):
    lora = ("model.lora.rank=4", "model.lora.alpha=64.0")
    config, rollouts = ppo_config(tmp_path, base, *lora), sequences()
    actor, rollout = Actor(config, total_iterations=1), Rollout(config)
    train(actor, rollouts)
    rollout.load_weights(actor.weights())
    rollout.weights_loaded(1)

    assert isinstance(rollout.engine, HuggingFaceEngine)
    model = rollout.engine.model
    with torch.no_grad():
        expected = actor.logprobs(rollouts)
        alone = [response_logprobs(model, rollouts, row, 1.0) for row in expected.index]
    np.testing.assert_allclose(torch.cat(alone), expected.values, atol=1e-5)
    assert np.abs(expected.values - actor.reference_logprobs(rollouts).values).max() > 1e-3


def test_updates_stop_early_above_the_target_kl(base, tmp_path):
    config = ppo_config(tmp_path, base, "ppo.target_kl=1e-7")
    metrics = train(Actor(config, total_iterations=1), sequences())
    assert metrics["ppo/steps"] == 2  # the first is at the old policy, the second is not


def test_the_entropy_bonus_raises_entropy(base, tmp_path):
    rollouts, actual = sequences(), []
    for coef in (0.0, 5.0):
        config = ppo_config(tmp_path, base, f"ppo.entropy_coef={coef}", "ppo.epochs=4")
        actor = Actor(config, total_iterations=1)
        before = actor.logprobs(rollouts).entropy
        train(actor, rollouts)
        actual.append(actor.logprobs(rollouts).entropy - before)
    assert actual[1] > actual[0] + 1e-3


def test_rollouts_of_stale_weights_are_refused(base, tmp_path):
    actor = Actor(ppo_config(tmp_path, base), total_iterations=1)
    with pytest.raises(RuntimeError, match="version 0, but 7 was expected"):
        train(actor, sequences(), weight_version=7)


def test_first_ratios_that_are_not_1_raise_an_assertion_error(base, tmp_path):
    actor = Actor(ppo_config(tmp_path, base), total_iterations=1)
    rollouts = sequences()
    wrong = logprobs(rollouts, actor.logprobs(rollouts).values + 0.01)
    inputs = [[rollouts], [scores(rollouts)], [values(rollouts)], [wrong], [logprobs(rollouts)]]
    with pytest.raises(AssertionError, match="first step's ratios"):
        actor.update(task(), *inputs)


def test_without_adapters_the_actor_is_the_reference(base, tmp_path):
    config = ppo_config(
        tmp_path,
        base,
        "model.lora.rank=4",
        "pools.reference_in_actor=true",
        "model.lora.alpha=64.0",
    )
    actor, rollouts = Actor(config, total_iterations=1), sequences()
    first = actor.logprobs(rollouts).values
    train(actor, rollouts)

    np.testing.assert_allclose(actor.reference_logprobs(rollouts).values, first, atol=1e-6)
    assert np.abs(actor.logprobs(rollouts).values - first).max() > 1e-3


def test_the_reference_uses_the_callers_temperature(base, tmp_path):
    reference, rollouts = Reference(ppo_config(tmp_path, base)), sequences()
    for temperature in (1.0, 0.7):
        config = ppo_config(tmp_path, base, f"rollout.temperature={temperature}")
        policy = Actor(config, total_iterations=1).logprobs(rollouts)
        same = reference.logprobs(temperature, rollouts)
        np.testing.assert_allclose(same.values, policy.values, atol=1e-5)

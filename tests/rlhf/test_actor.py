"""The policy's update against plain torch on sequences one by one; ranks, ZeRO, bad steps."""

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
from medgpt.engine import gather_weights
from medgpt.engine.schedule import learning_rate
from medgpt.rlhf.experience import Parts, RunningStats, assign_credit
from medgpt.rlhf.roles.actor import Actor
from medgpt.rlhf.roles.common import Task, step_rows
from medgpt.rlhf.roles.reference import Reference
from medgpt.rlhf.roles.rollout import HuggingFaceEngine, Rollout
from medgpt.rlhf.rollout_batch import Lessons, Sequences, join_tokens
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


def task(iteration: int = 0, **changes) -> Task:
    options = {"weight_version": 0, "kl_coef": 0.1, "score_stats": RunningStats()}
    return Task(**{**options, "iteration": iteration, "actor_learns": True, **changes})


def distributions(model, whole: Sequences, row: int, temperature: float) -> torch.Tensor:
    """(t, V) log-probabilities before each token of a row's response, by Hugging Face's own forward
    on this sequence alone."""
    prompt, response = whole.prompts.row(row), whole.responses.row(row)
    ids = torch.tensor(np.concatenate([prompt, response]))[None].long()
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1)


def response_logprobs(model, whole: Sequences, row: int, temperature: float) -> torch.Tensor:
    """(t,) of a row's response."""
    response = torch.from_numpy(whole.responses.row(row)).long()[:, None]
    return distributions(model, whole, row, temperature).gather(1, response)[:, 0]


def train(
    actor: Actor, whole: Sequences, value=None, *, beside: Lessons | None = None, **changes
) -> dict[str, float]:
    """One iteration, with the actor's own old log-probabilities and a reference a bit off."""
    old = gathered(actor.logprobs(whole))
    reference = logprobs(whole, "reference", shifted(whole))
    parts = [whole, scores(whole), values(whole, value), *old, reference]
    if beside is not None:
        parts.append(beside)
    return actor.update(task(**changes), *parts).metrics


def shifted(whole: Sequences) -> np.ndarray:
    return whole.logprobs + np.random.default_rng(5).normal(0, 0.1, len(whole.logprobs))


def gathered(part) -> list:
    """All ranks' parts."""
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
    config: PPOStageConfig, base: Path, beside: Callable[[Any, int], torch.Tensor] | None = None
) -> tuple[float, dict]:
    """Mean loss and weights after the same iteration; `beside` gives a step another loss."""
    whole = sequences()
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa").train()
    temperature = config.rollout.temperature
    with torch.no_grad():
        old = [response_logprobs(model, whole, row, temperature) for row in range(len(whole))]
    parts = [
        whole,
        scores(whole),
        values(whole),
        logprobs(whole, "actor", torch.cat(old)),
        logprobs(whole, "reference", shifted(whole)),
    ]
    experience = assign_credit(Parts.of(parts), config.ppo, kl_coef=0.1, score_stats=RunningStats())
    adam = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), eps=config.optimizer.eps, weight_decay=0.0
    )
    losses, ppo = [], config.ppo
    steps = list(step_rows(experience, config, 0))
    for number, rows in enumerate(steps):
        num_tokens = int(whole.responses.lengths[rows].sum())
        loss, bonus = torch.zeros(()), torch.zeros(())
        for row in rows:
            places = whole.responses.places([row])
            all_tokens = distributions(model, whole, row, temperature)
            chosen = torch.from_numpy(whole.responses.row(row)).long()[:, None]
            new = all_tokens.gather(1, chosen).T
            weights = experience.weights
            policy = ppo_policy_loss(
                new,
                old[row][None],
                experience.advantages[places][None],
                torch.ones_like(new, dtype=torch.bool),
                clip_range=ppo.clip_range,
                clip_range_high=ppo.clip_range_high,
                dual_clip=ppo.dual_clip,
                weights=None if weights is None else weights[places][None],
                num_tokens=num_tokens,
            )
            entropy = -(all_tokens.exp() * all_tokens).sum()
            loss = loss + policy.loss
            bonus = bonus + entropy / num_tokens
        adam.zero_grad()
        total = loss - ppo.entropy_coef * bonus
        (total if beside is None else total + beside(model, number)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
        for group in adam.param_groups:
            group["lr"] = learning_rate(number, ITERATIONS * len(steps), config.optimizer)
        adam.step()
        losses.append(loss.item())
    return float(np.mean(losses)), {n: p.detach().numpy() for n, p in model.named_parameters()}


def assert_same(found: dict, want: dict, atol: float) -> None:
    assert want
    for name, weight in want.items():
        np.testing.assert_allclose(found[name], weight, atol=atol, rtol=0, err_msg=name)


def assert_same_metrics(found: dict[str, float], want: dict[str, float]) -> None:
    for name in want:
        assert found[name] == pytest.approx(want[name], abs=1e-4), name


@pytest.fixture(scope="module")
def one_rank(base, tmp_path_factory):
    """The update on one rank without ZeRO."""
    return rank_update(tmp_path_factory.mktemp("one"), base)


def test_logprobs_are_those_of_each_sequence_alone_at_the_temperature(base, tmp_path):
    config = ppo_config(tmp_path, base, "rollout.temperature=0.7")
    whole = sequences()
    found = Actor(config, total_iterations=1).logprobs(
        share(whole, range(6)), share(whole, range(6, 12))
    )

    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa").eval()
    with torch.no_grad():
        want = torch.cat([response_logprobs(model, whole, row, 0.7) for row in found.index])
    np.testing.assert_allclose(found.values, want, atol=1e-5)
    assert found.entropy > 0


def test_an_iteration_is_what_plain_torch_does_sequence_by_sequence(base, tmp_path, one_rank):
    loss, weights = plain_torch(ppo_config(tmp_path, base), base)
    metrics, found = one_rank
    assert metrics["actor/loss"] == pytest.approx(loss, abs=1e-5)
    assert metrics["ppo/steps"] == 6
    assert_same(found, weights, atol=1e-5)
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert any(np.abs(found[name] - before[name].numpy()).max() > 1e-3 for name in found)


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
    went_on = train(actor, sequences(seed=1), iteration=1)

    again = Actor(config, total_iterations=ITERATIONS)
    again.load(str(tmp_path / "checkpoint"))
    assert train(again, sequences(seed=1), iteration=1) == went_on
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
    actor, whole = Actor(config, total_iterations=1), sequences()
    before = dict(gather_weights(actor.policy.model))
    metrics = train(actor, whole, kl_coef=np.inf)
    after = dict(gather_weights(actor.policy.model))
    return metrics, max((float((after[n] - w).abs().max()) for n, w in before.items()), default=0.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_where_no_step_is_finite_no_weight_moves(base, tmp_path, two_ranks, engine):
    found = two_ranks(nan_update, tmp_path, base, f"pools.actor.engine={engine}")
    for metrics, moved in found:
        assert moved == 0
        assert metrics["ppo/skipped_steps"] == metrics["ppo/steps"] == 6
        assert np.isnan(metrics["actor/grad_norm"])
        assert metrics["actor/loss"] == 0  # of no step


@pytest.mark.parametrize("part", ["value", "reference", "old"])
def test_a_sequence_that_is_not_finite_is_left_out_and_spoils_no_other(base, tmp_path, part):
    """With whitening, one such token would spoil every step of the batch."""
    whole, bad = sequences(), {"value": np.inf, "reference": np.nan, "old": -np.inf}
    found = []
    for number in (bad[part], None):
        actor = Actor(ppo_config(tmp_path, base), total_iterations=1)
        numbers = {
            "value": values(whole).values,
            "reference": shifted(whole),
            "old": join_tokens([actor.logprobs(whole)], whole.responses),
        }
        totals = scores(whole).totals.copy()
        if number is None:
            totals[0] = np.nan  # the same sequence, left out because its reward failed
        else:
            numbers[part] = numbers[part].copy()
            numbers[part][0] = number
        parts = [
            *(whole, scores(whole, totals), values(whole, numbers["value"])),
            logprobs(whole, "actor", numbers["old"]),
            logprobs(whole, "reference", numbers["reference"]),
        ]
        metrics = actor.update(task(), *parts).metrics
        assert metrics["ppo/steps"] == 6
        assert metrics["ppo/skipped_steps"] == 0
        assert metrics["ppo/not_finite"] == pytest.approx(0 if number is None else 1 / 12)
        found.append({name: p.detach().numpy() for name, p in actor.policy.named_parameters()})
    assert_same(*found, atol=1e-6)


def test_adapters_reach_the_rollout_engine_folded_in(base, tmp_path):
    lora = ("model.lora.rank=4", "model.lora.alpha=64.0")
    config, whole = ppo_config(tmp_path, base, *lora), sequences()
    actor, rollout = Actor(config, total_iterations=1), Rollout(config)
    train(actor, whole)
    rollout.load_weights(actor.weights())
    rollout.weights_loaded(1)

    assert isinstance(rollout.engine, HuggingFaceEngine)
    model = rollout.engine.model
    with torch.no_grad():
        want = actor.logprobs(whole)
        got = [response_logprobs(model, whole, row, 1.0) for row in want.index]
    np.testing.assert_allclose(torch.cat(got), want.values, atol=1e-5)
    assert np.abs(want.values - actor.reference_logprobs(whole).values).max() > 1e-3


def test_updates_end_when_the_policy_has_moved_too_far(base, tmp_path):
    config = ppo_config(tmp_path, base, "ppo.target_kl=1e-7")
    metrics = train(Actor(config, total_iterations=1), sequences())
    assert metrics["ppo/steps"] == 2  # the first is at the old policy, the second is not


def test_the_entropy_bonus_keeps_the_distribution_wide(base, tmp_path):
    whole, found = sequences(), []
    for coef in (0.0, 5.0):
        config = ppo_config(tmp_path, base, f"ppo.entropy_coef={coef}", "ppo.epochs=4")
        actor = Actor(config, total_iterations=1)
        before = actor.logprobs(whole).entropy
        train(actor, whole)
        found.append(actor.logprobs(whole).entropy - before)
    assert found[1] > found[0] + 1e-3


def test_rollouts_of_stale_weights_are_refused(base, tmp_path):
    actor = Actor(ppo_config(tmp_path, base), total_iterations=1)
    with pytest.raises(RuntimeError, match="version 0 where 7 was expected"):
        train(actor, sequences(), weight_version=7)


def test_a_policy_that_disagrees_with_itself_is_noticed(base, tmp_path):
    actor = Actor(ppo_config(tmp_path, base), total_iterations=1)
    whole = sequences()
    wrong = logprobs(whole, "actor", actor.logprobs(whole).values + 0.01)
    parts = [whole, scores(whole), values(whole), wrong, logprobs(whole, "reference")]
    with pytest.raises(AssertionError, match="first step's ratios"):
        actor.update(task(), *parts)


def test_without_adapters_the_actor_is_the_reference(base, tmp_path):
    config = ppo_config(
        tmp_path,
        base,
        "model.lora.rank=4",
        "pools.reference_in_actor=true",
        "model.lora.alpha=64.0",
    )
    actor, whole = Actor(config, total_iterations=1), sequences()
    first = actor.logprobs(whole).values
    train(actor, whole)

    np.testing.assert_allclose(actor.reference_logprobs(whole).values, first, atol=1e-6)
    assert np.abs(actor.logprobs(whole).values - first).max() > 1e-3


def test_the_reference_is_asked_at_the_temperature_of_the_one_who_asks(base, tmp_path):
    reference, whole = Reference(ppo_config(tmp_path, base)), sequences()
    for temperature in (1.0, 0.7):
        config = ppo_config(tmp_path, base, f"rollout.temperature={temperature}")
        policy = Actor(config, total_iterations=1).logprobs(whole)
        same = reference.logprobs(temperature, whole)
        np.testing.assert_allclose(same.values, policy.values, atol=1e-5)

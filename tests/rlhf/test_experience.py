"""Advantages and returns by hand-computed numbers; failed rewards, importance weights."""

import numpy as np
import pytest
import torch

from medgpt.config.ppo import PPOConfig
from medgpt.rlhf.experience import RunningStats, make_experience
from tests.rlhf.cases import logprobs, scores, sequences, share, values, with_empty_responses

NAN, NO_STATS = float("nan"), RunningStats()
TOTALS = np.random.default_rng(3).normal(size=6).astype(np.float32)


def experience_of(rollouts=None, *, totals=None, kl_coef=0.1, stats=NO_STATS, old=None, **options):
    rollouts = sequences() if rollouts is None else rollouts
    old = rollouts.logprobs + 0.1 if old is None else old
    config = PPOConfig(whiten_advantages=False, max_logprob_gap=1.0)
    return make_experience(
        [rollouts],
        [scores(rollouts, totals)],
        [values(rollouts)],
        [logprobs(rollouts, old)],
        [logprobs(rollouts, rollouts.logprobs - 0.2)],
        config=config.model_copy(update=options),
        kl_coef=kl_coef,
        score_stats=stats,
    )


def test_with_gamma_and_lambda_1_a_return_is_the_score_less_the_divergence_to_come():
    rollouts = sequences()
    experience = experience_of(rollouts, gae_lambda=1.0)
    given_scores = scores(rollouts).totals
    for row in range(len(rollouts)):
        positions = rollouts.responses.positions([row])
        tokens_left = np.arange(len(positions), 0, -1)
        expected = given_scores[row] - 0.1 * 0.3 * tokens_left
        np.testing.assert_allclose(experience.returns[positions], expected, atol=1e-5)
    flat = values(rollouts).values
    np.testing.assert_allclose(experience.advantages, experience.returns - flat, atol=1e-5)


@pytest.mark.parametrize(
    ("estimator", "divergence"), [("k1", 0.3), ("k2", 0.045), ("k3", np.exp(-0.3) - 1 + 0.3)]
)
def test_the_kl_estimator_is_configurable(estimator, divergence):
    rollouts = sequences()
    experience = experience_of(rollouts, gae_lambda=1.0, kl_estimator=estimator)
    first = rollouts.responses.offsets[:-1]
    expected = scores(rollouts).totals - 0.1 * divergence * rollouts.responses.lengths
    np.testing.assert_allclose(experience.returns[first], expected, atol=1e-5)
    assert experience.metrics["actor/kl_ref"] == pytest.approx(
        0.3 * rollouts.responses.lengths.mean()
    )


def test_scores_are_clipped():
    experience = experience_of(gae_lambda=1.0, kl_coef=0.0, score_clip=0.5)
    last = experience.sequences.responses.offsets[1:] - 1
    given_scores = scores(experience.sequences).totals
    np.testing.assert_allclose(experience.returns[last], given_scores.clip(-0.5, 0.5), atol=1e-6)
    assert np.abs(given_scores).max() > 0.5


def test_gamma_discounts_rewards_and_lambda_0_uses_one_step():
    rollouts = sequences()
    first = rollouts.responses.offsets[:-1]
    discounted = experience_of(rollouts, gae_lambda=1.0, kl_coef=0.0, gamma=0.5)
    expected = scores(rollouts).totals * 0.5 ** (rollouts.responses.lengths - 1)
    np.testing.assert_allclose(discounted.returns[first], expected, atol=1e-5)
    one_step = experience_of(rollouts, gae_lambda=0.0, kl_coef=0.0)
    longer = np.flatnonzero(rollouts.responses.lengths > 1)
    following = values(rollouts).values[first[longer] + 1]
    np.testing.assert_allclose(one_step.returns[first[longer]], following, atol=1e-5)


def test_penalties_are_taken_from_the_score():
    rollouts = sequences()
    plain = experience_of(rollouts, gae_lambda=1.0, kl_coef=0.0)
    experience = experience_of(
        rollouts, gae_lambda=1.0, kl_coef=0.0, length_penalty=0.5, missing_end_penalty=2.0
    )
    penalties = 0.5 * rollouts.responses.lengths + 2.0 * ~rollouts.finished
    expected = np.repeat(penalties, rollouts.responses.lengths)
    np.testing.assert_allclose(plain.returns - experience.returns, expected, atol=1e-5)


def test_normalized_scores_use_running_statistics():
    rollouts = sequences(3)
    stats = RunningStats().updated(np.array([1.0, 5.0], np.float32))
    experience = experience_of(
        rollouts,
        totals=[0.0, 2.0, 7.0],
        stats=stats,
        gae_lambda=1.0,
        kl_coef=0.0,
        normalize_scores=True,
    )
    all_scores = np.array([1.0, 5.0, 0.0, 2.0, 7.0])
    assert experience.score_stats.mean == pytest.approx(all_scores.mean())
    assert experience.score_stats.std == pytest.approx(all_scores.std(ddof=1))
    expected = (np.array([0.0, 2.0, 7.0]) - all_scores.mean()) / all_scores.std(ddof=1)
    last = experience.sequences.responses.offsets[1:] - 1
    np.testing.assert_allclose(experience.returns[last], expected, atol=1e-5)


def test_failed_rewards_and_empty_responses_are_left_out():
    rollouts = with_empty_responses(sequences(7), 3)
    lengths = rollouts.responses.lengths
    assert lengths[3] == 0 < lengths[2]
    totals = scores(rollouts).totals.copy()
    totals[2] = NAN
    experience = experience_of(rollouts, totals=totals, whiten_advantages=True)

    assert experience.valid_rows.tolist() == [0, 1, 4, 5, 6]
    assert experience.metrics["ppo/masked"] == 1
    assert experience.metrics["rollout/empty"] == 1
    kept = np.concatenate([rollouts.responses.positions([row]) for row in experience.valid_rows])
    assert experience.advantages[kept].mean().item() == pytest.approx(0, abs=1e-6)
    assert experience.advantages[kept].std().item() == pytest.approx(1, abs=1e-5)
    assert torch.isfinite(experience.advantages).all()
    assert experience.metrics["ppo/score_mean"] == pytest.approx(np.nanmean(totals))
    assert experience.metrics["rollout/response_tokens"] == pytest.approx(lengths.mean())


def test_a_batch_of_empty_responses_is_no_error():
    experience = experience_of(with_empty_responses(sequences(2), 0, 1), whiten_advantages=True)
    assert not len(experience.valid_rows)
    assert experience.metrics["rollout/empty"] == 2
    assert all(np.isfinite(value) for value in experience.metrics.values())


@pytest.mark.parametrize("which", ["value", "bootstrap", "score"])
def test_nonfinite_sequences_are_counted_and_left_out_of_whitening(which):
    rollouts = sequences(6)
    flat, bootstrap, totals = (
        x.copy() for x in (values(rollouts).values, values(rollouts).bootstrap, TOTALS)
    )
    {"value": flat, "bootstrap": bootstrap, "score": totals}[which][0] = np.inf
    experience = make_experience(
        [rollouts],
        [scores(rollouts, totals)],
        [values(rollouts, flat, bootstrap)],
        [logprobs(rollouts)],
        [logprobs(rollouts)],
        config=PPOConfig(max_logprob_gap=1.0),
        kl_coef=0.1,
        score_stats=NO_STATS,
    )
    assert experience.valid_rows.tolist() == [1, 2, 3, 4, 5]
    assert experience.metrics["ppo/not_finite"] == (0 if which == "score" else pytest.approx(1 / 6))
    assert experience.metrics["ppo/masked"] == (which == "score")
    kept = rollouts.responses.positions(experience.valid_rows)
    assert experience.advantages[kept].std().item() == pytest.approx(1, abs=1e-5)
    assert all(np.isfinite(value) for value in experience.metrics.values())
    assert experience.score_stats.num == 5


def test_no_row_is_valid_where_every_reward_failed():
    experience = experience_of(sequences(3), totals=[NAN] * 3)
    assert not len(experience.valid_rows)
    assert all(np.isfinite(value) for value in experience.metrics.values())


@pytest.mark.parametrize("bootstrap", [False, True])
def test_only_truncated_responses_bootstrap_from_the_critic(bootstrap):
    rollouts = sequences()
    experience = experience_of(rollouts, bootstrap_truncated=bootstrap, gae_lambda=1.0, kl_coef=0.0)
    last = rollouts.responses.offsets[1:] - 1
    bootstrapped = values(rollouts).bootstrap * ~rollouts.finished * bootstrap
    np.testing.assert_allclose(
        experience.returns[last], scores(rollouts).totals + bootstrapped, atol=1e-5
    )
    assert not rollouts.finished.all()


def test_workers_shares_give_the_same_as_one_worker():
    rollouts = sequences()
    one_worker = experience_of(rollouts, whiten_advantages=True)
    shares = []
    for index in ([0, 3, 5, 7, 9], [11, 1, 2, 4, 6, 8, 10]):
        part = share(rollouts, index)
        positions = rollouts.responses.positions(index)
        outputs = (
            part,
            scores(part, scores(rollouts).totals[index]),
            values(part, values(rollouts).values[positions], values(rollouts).bootstrap[index]),
            logprobs(part, part.logprobs + 0.1),
            logprobs(part, part.logprobs - 0.2),
        )
        shares.append(outputs)
    two_workers = make_experience(
        *zip(*shares, strict=True),
        config=PPOConfig(max_logprob_gap=1.0),
        kl_coef=0.1,
        score_stats=RunningStats(),
    )
    torch.testing.assert_close(two_workers.advantages, one_worker.advantages, atol=0, rtol=0)
    assert two_workers.metrics == one_worker.metrics


@pytest.mark.parametrize("largest", [1.0, 2.0])
def test_a_far_rollout_engine_is_corrected_by_truncated_weights(largest):
    rollouts = sequences()
    shift = np.linspace(-1, 1, len(rollouts.logprobs), dtype=np.float32)
    close_engine = experience_of(rollouts, old=rollouts.logprobs + 1e-4)
    options = {"max_logprob_gap": 0.01, "max_importance_weight": largest}
    far_engine = experience_of(rollouts, old=rollouts.logprobs + shift, **options)
    assert close_engine.importance_weights is None
    assert close_engine.metrics["rollout/logprob_gap"] == pytest.approx(1e-4, rel=1e-2)
    assert far_engine.importance_weights is not None
    np.testing.assert_allclose(
        far_engine.importance_weights, np.minimum(np.exp(shift), largest), rtol=1e-5
    )
    assert far_engine.metrics["rollout/logprob_gap_max"] == pytest.approx(1.0, abs=1e-6)


def test_running_statistics_do_not_depend_on_the_chunks():
    numbers = np.random.default_rng(0).normal(3, 2, 100).astype(np.float32)
    stats = RunningStats()
    for part in np.split(numbers, [1, 1, 30, 77]):
        stats = stats.updated(part)
    assert stats.num == 100
    assert stats.mean == pytest.approx(numbers.mean(), rel=1e-6)
    assert stats.std == pytest.approx(numbers.std(ddof=1), rel=1e-6)

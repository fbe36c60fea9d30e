"""What tokens are worth, by hand and against plain loops; failed rewards and stale policies."""

import numpy as np
import pytest
import torch

from medgpt.config.ppo import PPOConfig
from medgpt.rlhf.experience import Parts, RunningStats, assign_credit
from tests.rlhf.cases import logprobs, scores, sequences, share, values, without_response

NAN, NO_STATS = float("nan"), RunningStats()
TOTALS = np.random.default_rng(3).normal(size=6).astype(np.float32)


def credit(whole=None, *, totals=None, kl_coef=0.1, stats=NO_STATS, old=None, **options):
    whole = sequences() if whole is None else whole
    old = whole.logprobs + 0.1 if old is None else old
    parts = [
        whole,
        scores(whole, totals),
        values(whole),
        logprobs(whole, "actor", old),
        logprobs(whole, "reference", whole.logprobs - 0.2),
    ]
    config = PPOConfig(whiten_advantages=False, max_logprob_gap=1.0)
    config = config.model_copy(update=options)
    return assign_credit(Parts.of(parts), config, kl_coef=kl_coef, score_stats=stats)


def test_with_gamma_and_lambda_1_a_return_is_the_score_less_the_divergence_to_come():
    whole = sequences()
    found = credit(whole, gae_lambda=1.0)
    given = scores(whole).totals
    for row in range(len(whole)):
        places = whole.responses.places([row])
        left = np.arange(len(places), 0, -1)
        want = given[row] - 0.1 * 0.3 * left
        np.testing.assert_allclose(found.returns[places], want, atol=1e-5)
    flat = values(whole).values
    np.testing.assert_allclose(found.advantages, found.returns - flat, atol=1e-5)


@pytest.mark.parametrize(
    ("estimator", "divergence"), [("k1", 0.3), ("k2", 0.045), ("k3", np.exp(-0.3) - 1 + 0.3)]
)
def test_the_divergence_is_estimated_as_told(estimator, divergence):
    whole = sequences()
    found = credit(whole, gae_lambda=1.0, kl_estimator=estimator)
    first = whole.responses.offsets[:-1]
    want = scores(whole).totals - 0.1 * divergence * whole.responses.lengths
    np.testing.assert_allclose(found.returns[first], want, atol=1e-5)
    assert found.metrics["actor/kl_ref"] == pytest.approx(0.3 * whole.responses.lengths.mean())


def test_scores_are_clipped():
    found = credit(gae_lambda=1.0, kl_coef=0.0, score_clip=0.5)
    last = found.sequences.responses.offsets[1:] - 1
    given = scores(found.sequences).totals
    np.testing.assert_allclose(found.returns[last], given.clip(-0.5, 0.5), atol=1e-6)
    assert np.abs(given).max() > 0.5


def test_later_rewards_are_discounted_and_advantages_cut_short():
    whole = sequences()
    first = whole.responses.offsets[:-1]
    discounted = credit(whole, gae_lambda=1.0, kl_coef=0.0, gamma=0.5)
    want = scores(whole).totals * 0.5 ** (whole.responses.lengths - 1)
    np.testing.assert_allclose(discounted.returns[first], want, atol=1e-5)
    one_step = credit(whole, gae_lambda=0.0, kl_coef=0.0)
    longer = np.flatnonzero(whole.responses.lengths > 1)
    following = values(whole).values[first[longer] + 1]
    np.testing.assert_allclose(one_step.returns[first[longer]], following, atol=1e-5)


def test_penalties_are_taken_from_the_score():
    whole = sequences()
    plain = credit(whole, gae_lambda=1.0, kl_coef=0.0)
    found = credit(whole, gae_lambda=1.0, kl_coef=0.0, length_penalty=0.5, missing_end_penalty=2.0)
    taken = 0.5 * whole.responses.lengths + 2.0 * ~whole.finished
    want = np.repeat(taken, whole.responses.lengths)
    np.testing.assert_allclose(plain.returns - found.returns, want, atol=1e-5)


def test_scores_are_relative_to_all_so_far():
    whole = sequences(3)
    stats = RunningStats().including(np.array([1.0, 5.0], np.float32))
    found = credit(
        whole,
        totals=[0.0, 2.0, 7.0],
        stats=stats,
        gae_lambda=1.0,
        kl_coef=0.0,
        normalise_scores=True,
    )
    everything = np.array([1.0, 5.0, 0.0, 2.0, 7.0])
    assert found.score_stats.mean == pytest.approx(everything.mean())
    assert found.score_stats.std == pytest.approx(everything.std(ddof=1))
    want = (np.array([0.0, 2.0, 7.0]) - everything.mean()) / everything.std(ddof=1)
    last = found.sequences.responses.offsets[1:] - 1
    np.testing.assert_allclose(found.returns[last], want, atol=1e-5)


def test_a_failed_reward_and_an_empty_response_take_no_part():
    whole = without_response(sequences(7), 3)
    lengths = whole.responses.lengths
    assert lengths[3] == 0 < lengths[2]
    totals = scores(whole).totals.copy()
    totals[2] = NAN
    found = credit(whole, totals=totals, whiten_advantages=True)

    assert found.rows.tolist() == [0, 1, 4, 5, 6]
    assert found.metrics["ppo/masked"] == 1
    assert found.metrics["rollout/empty"] == 1
    kept = np.concatenate([whole.responses.places([row]) for row in found.rows])
    assert found.advantages[kept].mean().item() == pytest.approx(0, abs=1e-6)
    assert found.advantages[kept].std().item() == pytest.approx(1, abs=1e-5)
    assert torch.isfinite(found.advantages).all()
    assert found.metrics["ppo/score_mean"] == pytest.approx(np.nanmean(totals))
    assert found.metrics["rollout/response_tokens"] == pytest.approx(lengths.mean())


def test_a_batch_of_nothing_but_empty_responses_is_no_error():
    found = credit(without_response(sequences(2), 0, 1), whiten_advantages=True)
    assert not len(found.rows)
    assert found.metrics["rollout/empty"] == 2
    assert all(np.isfinite(value) for value in found.metrics.values())


@pytest.mark.parametrize("which", ["value", "after", "score"])
def test_what_is_not_finite_is_counted_and_spoils_no_other_advantage(which):
    whole = sequences(6)
    flat, after, totals = (x.copy() for x in (values(whole).values, values(whole).after, TOTALS))
    {"value": flat, "after": after, "score": totals}[which][0] = np.inf
    parts = [
        *(whole, scores(whole, totals), values(whole, flat, after)),
        *(logprobs(whole, "actor"), logprobs(whole, "reference")),
    ]
    found = assign_credit(
        Parts.of(parts), PPOConfig(max_logprob_gap=1.0), kl_coef=0.1, score_stats=NO_STATS
    )
    assert found.rows.tolist() == [1, 2, 3, 4, 5]
    assert found.metrics["ppo/not_finite"] == (0 if which == "score" else pytest.approx(1 / 6))
    assert found.metrics["ppo/masked"] == (which == "score")
    kept = whole.responses.places(found.rows)
    assert found.advantages[kept].std().item() == pytest.approx(1, abs=1e-5)
    assert all(np.isfinite(value) for value in found.metrics.values())
    assert found.score_stats.num == 5


def test_nothing_is_left_where_every_reward_failed():
    found = credit(sequences(3), totals=[NAN] * 3)
    assert not len(found.rows)
    assert all(np.isfinite(value) for value in found.metrics.values())


@pytest.mark.parametrize("bootstrap", [False, True])
def test_only_a_truncated_response_goes_on_in_the_critics_eyes(bootstrap):
    whole = sequences()
    found = credit(whole, bootstrap_truncated=bootstrap, gae_lambda=1.0, kl_coef=0.0)
    last = whole.responses.offsets[1:] - 1
    goes_on = values(whole).after * ~whole.finished * bootstrap
    np.testing.assert_allclose(found.returns[last], scores(whole).totals + goes_on, atol=1e-5)
    assert not whole.finished.all()


def test_workers_shares_give_the_same_as_one_worker():
    whole = sequences()
    one = credit(whole, whiten_advantages=True)
    parts = []
    for index in ([0, 3, 5, 7, 9], [11, 1, 2, 4, 6, 8, 10]):
        part = share(whole, index)
        places = whole.responses.places(index)
        parts += [
            part,
            scores(part, scores(whole).totals[index]),
            values(part, values(whole).values[places], values(whole).after[index]),
            logprobs(part, "actor", part.logprobs + 0.1),
            logprobs(part, "reference", part.logprobs - 0.2),
        ]
    config = PPOConfig(max_logprob_gap=1.0)
    two = assign_credit(Parts.of(parts), config, kl_coef=0.1, score_stats=RunningStats())
    torch.testing.assert_close(two.advantages, one.advantages, atol=0, rtol=0)
    assert two.metrics == one.metrics


@pytest.mark.parametrize("largest", [1.0, 2.0])
def test_a_far_rollout_engine_is_corrected_by_truncated_weights(largest):
    whole = sequences()
    shift = np.linspace(-1, 1, len(whole.logprobs), dtype=np.float32)
    near = credit(whole, old=whole.logprobs + 1e-4)
    options = {"max_logprob_gap": 0.01, "max_importance_weight": largest}
    far = credit(whole, old=whole.logprobs + shift, **options)
    assert near.weights is None
    assert near.metrics["rollout/logprob_gap"] == pytest.approx(1e-4, rel=1e-2)
    assert far.weights is not None
    np.testing.assert_allclose(far.weights, np.minimum(np.exp(shift), largest), rtol=1e-5)
    assert far.metrics["rollout/logprob_gap_max"] == pytest.approx(1.0, abs=1e-6)


def test_running_statistics_do_not_depend_on_how_they_were_gathered():
    numbers = np.random.default_rng(0).normal(3, 2, 100).astype(np.float32)
    stats = RunningStats()
    for part in np.split(numbers, [1, 1, 30, 77]):
        stats = stats.including(part)
    assert stats.num == 100
    assert stats.mean == pytest.approx(numbers.mean(), rel=1e-6)
    assert stats.std == pytest.approx(numbers.std(ddof=1), rel=1e-6)

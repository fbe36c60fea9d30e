"""Each option of the update has the effect that it has in plain torch."""

import numpy as np
import pytest

from medgpt.engine.schedule import learning_rate
from medgpt.rlhf.roles.actor import Actor
from tests.rlhf.cases import ppo_config, sequences
from tests.rlhf.inline import comparable_metrics, make_ppo
from tests.rlhf.test_actor import ITERATIONS, assert_same, plain_torch, rank_update, train
from tests.rlhf.test_ppo import config_of

NARROW = "ppo.clip_range=0.002"  # a small model moves little in a few steps


@pytest.mark.parametrize(
    ("options", "without"),
    [
        (("rollout.temperature=0.7",), ()),
        ((NARROW,), ()),
        ((NARROW, "ppo.clip_range_high=0.01"), (NARROW,)),
        ((NARROW, "ppo.dual_clip=1.003"), (NARROW,)),
        (("ppo.entropy_coef=0.5",), ()),
        (("ppo.max_logprob_gap=100.0",), ()),
        (("ppo.whiten_advantages=false",), ()),
        (("ppo.epochs=1",), ()),
        (("optimizer.max_grad_norm=0.01", "optimizer.eps=1e-3"), ("optimizer.eps=1e-3",)),
    ],
    ids=lambda options: " ".join(options) or "-",
)
def test_each_option_changes_the_update_as_in_plain_torch(base, tmp_path, options, without):
    loss, weights = plain_torch(ppo_config(tmp_path, base, *options), base)
    metrics, weights_with = rank_update(tmp_path, base, *options)
    assert metrics["actor/loss"] == pytest.approx(loss, abs=1e-5)
    assert_same(weights_with, weights, atol=2e-5)

    _, others = rank_update(tmp_path, base, *without)
    assert max(np.abs(weights_with[name] - others[name]).max() for name in weights_with) > 1e-4


def test_sampling_policy_and_reference_are_compared_at_one_temperature(base, tmp_path):
    """With different temperatures these metrics would be far from 0."""
    entropies = []
    for name, temperature in (("warm", 1.0), ("cold", 0.3)):
        config = config_of(tmp_path / name, base, f"rollout.temperature={temperature}")
        ppo = make_ppo(config, 1)
        ppo.fit()
        (line,) = comparable_metrics(ppo.run)
        assert line["rollout/logprob_gap_max"] < 1e-4
        assert line["actor/first_ratio_error"] < 1e-4
        assert abs(line["actor/kl_ref"]) < 1e-4
        entropies.append(line["actor/entropy"])
    assert entropies[1] < entropies[0] - 0.5


def test_an_early_stop_does_not_shift_the_learning_rate_schedule(base, tmp_path):
    config = ppo_config(tmp_path, base, "ppo.target_kl=1e-7")
    actor, rollouts = Actor(config, total_iterations=ITERATIONS), sequences()
    assert train(actor, rollouts)["ppo/steps"] == 2
    metrics = train(actor, rollouts, iteration=1)
    assert metrics["ppo/steps"] == 2
    assert metrics["actor/learning_rate"] == learning_rate(7, 18, config.optimizer)

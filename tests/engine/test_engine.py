import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from medgpt.config.train import EngineConfig, OptimizerConfig
from medgpt.engine import Engine
from tests.engine.cases import (
    CPU,
    OPTIMIZER,
    EngineSetup,
    Outcome,
    loss_of,
    micro_batches,
    new_engine,
    new_net,
    reference,
    run_all,
    save,
    train,
    train_step,
)

TwoRanks = Callable[..., list[Any]]
STAGES = [
    EngineSetup(stage, off) for stage in range(4) for off in (False, True) if stage or not off
]
BF16 = [EngineSetup(case.zero_stage, case.offload, "bf16") for case in STAGES]


def assert_equal(outcome: Outcome, expected: Outcome, tolerance: float = 1e-6) -> None:
    assert outcome.losses == pytest.approx(expected.losses, abs=tolerance)
    assert outcome.norms == pytest.approx(expected.norms, abs=tolerance)
    assert outcome.weights.keys() == expected.weights.keys()
    for name, values in expected.weights.items():
        np.testing.assert_allclose(outcome.weights[name], values, rtol=0, atol=tolerance)


def test_the_reference_clips_in_every_step() -> None:
    assert min(reference(3).norms) > OPTIMIZER.max_grad_norm


@pytest.mark.parametrize("case", STAGES, ids=str)
def test_one_rank_trains_like_plain_torch(case: EngineSetup) -> None:
    assert_equal(train(case, 3), reference(3))


def test_two_ranks_with_ragged_shares_train_like_plain_torch(two_ranks: TwoRanks) -> None:
    expected = reference(3)
    outcomes, others = two_ranks(run_all, train, STAGES, [3] * len(STAGES))
    for outcome, other in zip(outcomes, others, strict=True):
        assert other.norms == outcome.norms
        assert other.weights == {}  # only rank 0 gets them
        assert_equal(outcome, expected)


def test_optimizer_offload_without_zero_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"offload_optimizer=true needs zero_stage 1, 2 or 3"):
        new_engine(EngineSetup(0, offload=True))


class Scalar(nn.Module):
    """A single parameter that is scaled; its gradient is the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(1))

    def forward(self, scale: float) -> Tensor:
        return (self.value * scale).sum()


def scalar_engine(case: EngineSetup, **optimizer: float) -> Engine:
    defaults = {"schedule": "constant", "warmup_share": 0, "max_grad_norm": 0}
    config = OptimizerConfig.model_validate(defaults | optimizer)
    return Engine(Scalar(), engine=case.config(), optimizer=config, total_steps=100, device=CPU)


def accumulated_norm(case: EngineSetup) -> float:
    """Return the norm of 1 + 8 x 2^-10, a sum in which bf16 would lose every term but the first."""
    engine = scalar_engine(case)
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    for scale in [1.0, *[2.0**-10] * 8][rank::num_ranks]:
        engine.backward(engine(scale))
    for _ in range(-9 % num_ranks if rank else 0):
        engine.backward(engine(1.0) * 0)
    return engine.step()


@pytest.mark.parametrize("case", BF16, ids=str)
def test_bf16_gradients_accumulate_in_fp32(case: EngineSetup) -> None:
    assert accumulated_norm(case) == 1 + 8 * 2.0**-10


def test_bf16_gradients_of_two_ranks_add_up_in_fp32(two_ranks: TwoRanks) -> None:
    norms, _ = two_ranks(run_all, accumulated_norm, BF16)
    assert norms == [1 + 8 * 2.0**-10] * len(BF16)


@pytest.mark.parametrize("case", BF16, ids=str)
def test_a_small_update_survives_in_the_master_weights(case: EngineSetup, tmp_path: Path) -> None:
    # Adam moves by the learning rate while the gradient is constant; bf16 has steps of 2^-8 below 1
    engine = scalar_engine(case, learning_rate=1e-6)
    for _ in range(3):
        engine.backward(engine(1.0))
        engine.step()
    assert engine.module.value.dtype == torch.bfloat16
    save(engine, tmp_path)
    other = scalar_engine(EngineSetup(0))
    other.load(tmp_path)
    assert other.module.value.item() == pytest.approx(1 - 3e-6, abs=2e-7)


@pytest.mark.parametrize("case", [*STAGES, *BF16], ids=str)
def test_a_gradient_that_is_not_finite_changes_nothing(case: EngineSetup) -> None:
    engine = scalar_engine(case, learning_rate=0.5)
    engine.backward(engine(math.nan))
    assert not math.isfinite(engine.step())
    assert engine.steps == 1
    engine.backward(engine(1.0))
    assert engine.step() == 1.0
    with torch.no_grad():
        assert float(engine(1.0)) == 0.5  # the first update of Adam


class TwoParameters(nn.Module):
    """Two parameters; the second one is not used in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def forward(self, both: bool) -> Tensor:
        return self.first.sum() + self.second.sum() if both else self.first.sum()


def second_parameter_after_missing_gradients(case: EngineSetup) -> list[float]:
    """Return the second parameter after a step with both and a step without it."""
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", warmup_share=0)
    net = TwoParameters()
    engine = Engine(net, engine=case.config(), optimizer=config, total_steps=9, device=CPU)
    for both in (True, False):
        engine.backward(engine(both))
        engine.step()
    return net.second.tolist()


def test_parameters_without_gradient_follow_their_moments_at_every_stage(
    two_ranks: TwoRanks,
) -> None:
    cases = [EngineSetup(stage) for stage in range(3)]
    found = run_all(second_parameter_after_missing_gradients, cases)
    of_two, _ = two_ranks(run_all, second_parameter_after_missing_gradients, cases)
    for second in found + of_two:
        assert second == pytest.approx(found[1])  # DeepSpeed's optimizer
        assert max(second) < 0.89  # the first step moved it by 0.1


def test_the_learning_rate_is_that_of_the_latest_step() -> None:
    engine = new_engine(EngineSetup(0))  # warm-up of 2 of 8 steps to 0.02
    assert engine.learning_rate == pytest.approx(0.02 / 3)
    train_step(engine, 0)
    assert engine.learning_rate == pytest.approx(0.02 / 3)
    train_step(engine, 1)
    assert engine.learning_rate == pytest.approx(0.02 * 2 / 3)


def test_frozen_parameters_stay_and_are_not_checkpointed(tmp_path: Path) -> None:
    for case in STAGES:
        net = new_net()
        net.inner.requires_grad_(False)
        net.wide.requires_grad_(False)
        engine = new_engine(case, net)
        for step in range(2):
            train_step(engine, step)
        save(engine, tmp_path / str(case))
        follow_up = train_step(engine, 2)

        other = new_net(seed=99)  # the base model is the same, the trained part is not
        with torch.no_grad():
            for name in ("inner", "wide"):
                fresh, base = getattr(other, name), getattr(new_net(), name)
                fresh.load_state_dict(base.state_dict())
                fresh.requires_grad_(False)
        resumed = new_engine(case, other)
        resumed.load(tmp_path / str(case))
        assert train_step(resumed, 2) == pytest.approx(follow_up, abs=1e-6)


def forward_only(case: EngineSetup) -> float:
    """Compute a loss without gradients between training steps, like validation."""
    engine = new_engine(case)
    train_step(engine, 0)
    tokens = micro_batches(0)[0]
    engine.module.eval()
    with torch.no_grad():
        before = loss_of(engine(tokens)["logits"], tokens, len(tokens))
    engine.module.train()
    train_step(engine, 1)
    return float(before)


def test_validation_between_steps_is_harmless(two_ranks: TwoRanks) -> None:
    losses = two_ranks(run_all, forward_only, STAGES)
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx([losses[0][0]] * len(STAGES), abs=1e-6)


def test_the_engine_prints_nothing_to_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    for case in (*STAGES, *BF16):
        train_step(new_engine(case), 0)
    assert capfd.readouterr().out == ""


def test_precision_auto_is_fp32_on_a_cpu() -> None:
    engine = Engine(
        new_net(), engine=EngineConfig(), optimizer=OPTIMIZER, total_steps=1, device=CPU
    )
    assert engine.module.inner.weight.dtype == torch.float32

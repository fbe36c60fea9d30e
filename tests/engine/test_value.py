"""A value model trains the same at every ZeRO stage, on one or two ranks, with or without LoRA."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from medgpt.config.model import ModelConfig
from medgpt.engine import Engine
from medgpt.engine.build import build_trainable_value_model
from medgpt.models.value_model import RewardModelInfo, build_value_model, last_token_values
from tests.engine.cases import CPU, OPTIMIZER, EngineSetup
from tests.models.tiny_models import random_batch, tiny_model

TwoRanks = Callable[..., list[Any]]
GENTLE = OPTIMIZER.model_copy(update={"learning_rate": 0.001})
BATCHES = [[5, 9], [3], [7, 2, 4], [6]]  # sequence lengths of each micro-batch


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    return folder


def losses(case: EngineSetup, name: str, rank: int, steps: int = 3) -> list[float]:
    """Return the squared distance of the scores from 1, summed over all ranks, of each step."""
    config = ModelConfig.model_validate({"name": name, "lora": {"rank": rank}})
    module = build_trainable_value_model(config, case.config(), CPU, seed=5)
    engine = Engine(module, engine=case.config(), optimizer=GENTLE, total_steps=steps, device=CPU)
    found = []
    for _ in range(steps):
        total = torch.zeros(())
        for number in range(dist.get_rank(), len(BATCHES), dist.get_world_size()):
            batch = random_batch(BATCHES[number], seed=number)
            loss = ((last_token_values(engine(batch), batch) - 1) ** 2).sum() / 7
            engine.backward(loss)
            total += loss.detach()
        engine.step()
        dist.all_reduce(total)
        found.append(float(total))
    return found


def all_losses(name: str) -> list[list[float]]:
    return [losses(EngineSetup(stage), name, rank) for stage in range(4) for rank in (0, 2)]


def test_zero_stages_and_ranks_agree_with_and_without_lora(base: Path, two_ranks: TwoRanks) -> None:
    alone = all_losses(str(base))
    together, _ = two_ranks(all_losses, str(base))

    for each in alone:
        assert each[2] < 0.99 * each[0]
    for found in (alone, together):
        for number, each in enumerate(found):
            assert each == pytest.approx(alone[number % 2], abs=1e-5)


def scores(case: EngineSetup, name: str) -> Tensor:
    model = build_trainable_value_model(ModelConfig(name=name), case.config(), CPU, seed=5)
    engine = Engine(model, engine=case.config(), optimizer=OPTIMIZER, total_steps=1, device=CPU)
    batch = random_batch([4, 6])
    with torch.no_grad():
        return last_token_values(engine(batch), batch)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_critic_starts_as_the_reward_model(base: Path, tmp_path: Path, stage: int) -> None:
    model = build_value_model(ModelConfig(name=str(base)), seed=9, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    raw = scores(EngineSetup(stage), str(tmp_path))
    RewardModelInfo(mean=0.5, std=2.0, normalised_on="chosen answers", speech={}).write(tmp_path)

    torch.testing.assert_close(scores(EngineSetup(stage), str(tmp_path)), (raw - 0.5) / 2)

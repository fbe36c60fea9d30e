from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medgpt.config.stages import SFTConfig
from medgpt.data.loader.stream import PackedRow
from medgpt.engine import Engine, state
from medgpt.models.tokenizer import load_tokenizer
from medgpt.train.lm_objective import LanguageModelObjective
from tests.engine.ranks import start_ranks
from tests.train.tiny_configs import sft_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    with start_ranks(tmp_path_factory.mktemp("ranks") / "store") as run:
        yield run


def row() -> PackedRow:
    ids = np.arange(20, dtype=np.int32) * 7 % 300
    return PackedRow(
        input_ids=ids,
        targets=ids > 0,
        word_ids=None,
        lengths=np.array([12, 8]),
        sample_ids=["a", "b"],
        chunks=[0, 0],
        repeat=[0, 0],
    )


def train(config: SFTConfig) -> tuple[list[float], bool]:
    """Return the losses of three steps on a row, and whether the base was partitioned."""
    name = config.model.name
    assert name is not None
    objective = LanguageModelObjective(config, load_tokenizer(name), CPU)
    frozen = [p for p in objective.module.parameters() if not p.requires_grad]
    partitioned = all(state.is_zero_param(p) for p in frozen)
    engine = Engine(
        objective.module,
        engine=config.engine,
        optimizer=config.optimizer,
        total_steps=5,
        device=CPU,
    )
    batch = objective.collate([row()], epoch=0)
    losses = []
    for _ in range(3):
        loss = engine(batch, num_tokens=2 * batch.num_targets)
        engine.backward(loss)
        engine.step()
        losses.append(2 * float(loss))
    return losses, partitioned


def test_adapters_train_the_same_on_a_partitioned_base(
    base: Path, tmp_path: Path, two_ranks: Callable[..., list[Any]]
) -> None:
    def results(stage: int) -> list[tuple[list[float], bool]]:
        config = sft_config(
            tmp_path,
            tmp_path,
            base,
            model={"lora": {"rank": 4}},
            engine={"zero_stage": stage},
        )
        return two_ranks(train, config)

    replicated, partitioned_runs = results(0), results(3)
    assert [partitioned for _, partitioned in replicated + partitioned_runs] == [
        False,
        False,
        True,
        True,
    ]
    assert replicated[0][0][0] > replicated[0][0][-1]
    for losses, _ in partitioned_runs:
        assert losses == pytest.approx(replicated[0][0], abs=1e-5)

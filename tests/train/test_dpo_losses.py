"""Every loss that a config accepts trains with TRL on our rows."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist

from medgpt.config.dpo import DPOConfig, PairLoss, UnpairedLoss
from medgpt.config.loading import validate
from medgpt.models.tokenizer import load_tokenizer
from medgpt.runs import Run
from tests.engine.ranks import start_ranks
from tests.train.test_reward_objective import rows


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    """Start separate processes, because accelerate changes global state."""
    with start_ranks(tmp_path_factory.mktemp("ranks") / "store") as run:
        yield run


def train(folder: Path, base: Path, loss: str) -> tuple[list[float], float]:
    """Return the losses of two steps and the largest change of a weight."""
    from accelerate.state import AcceleratorState

    from medgpt.train.dpo import make_trainer  # TRL, for the ranks alone

    AcceleratorState._reset_state(reset_partial_state=True)  # of the trainer before
    os.environ |= {  # as Ray Train sets them, for accelerate
        "RANK": str(dist.get_rank()),
        "WORLD_SIZE": str(dist.get_world_size()),
        "LOCAL_RANK": str(dist.get_rank()),
        "LOCAL_WORLD_SIZE": str(dist.get_world_size()),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    tree = {
        "run": {"dir": str(folder)},
        "model": {"name": str(base)},
        "data": {
            "sources": [{"name": "a", "paths": ["/a.jsonl"], "license": "MIT"}],
            "max_length": 64,
        },
        "train": {"global_batch_size": 4, "micro_batch_size": 2, "max_steps": 2},
        "optimizer": {"learning_rate": 1e-3, "warmup_share": 0.0},
        "dpo": {"loss": [loss], "label_smoothing": 1e-3 if loss == "exo_pair" else 0.0},
    }
    tokenizer, device = load_tokenizer(str(base)), torch.device("cpu")
    config = validate(DPOConfig, tree)
    trainer = make_trainer(Run(str(folder)), config, tokenizer, device, rows(), [])
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = [(p - before[name]).abs().max() for name, p in trainer.model.named_parameters()]
    return [log["loss"] for log in trainer.state.log_history if "loss" in log], float(max(moved))


@pytest.mark.parametrize("loss", [*get_args(PairLoss), *get_args(UnpairedLoss)])
def test_every_accepted_loss_trains(
    base: Path, tmp_path: Path, two_ranks: Callable[..., list[Any]], loss: str
) -> None:
    (losses, moved), (_, also) = two_ranks(train, tmp_path, base, loss)
    assert len(losses) == 2
    assert torch.tensor(losses).isfinite().all()
    assert moved == also > 1e-4

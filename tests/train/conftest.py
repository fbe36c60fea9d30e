"""One small pretraining run that the tests of this folder look at and build on."""

from pathlib import Path

import pytest

from medgpt.runs import Run
from medgpt.stages.train import run_pretrain
from tests.train.tiny_configs import pretrain_config


@pytest.fixture(scope="session")
def pretrained(
    ray_session: None, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """Two workers, ZeRO-2, audited, never interrupted."""
    return run_pretrain(pretrain_config(tmp_path_factory.mktemp("runs") / "pretrain", tiny_corpus))

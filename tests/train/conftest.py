"""One small pretraining run that the tests of this folder look at and build on."""

from pathlib import Path

import pytest

from medgpt.config import PretrainConfig
from medgpt.eval.stages import run_pretrain
from medgpt.models.load import SpecialIds, build_model
from medgpt.models.tokenizer import train_tokenizer
from medgpt.runs import Run
from tests.train.cases import pretrain_config, pretrain_tree


@pytest.fixture(scope="session")
def pretrained(
    ray_session: None, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """Two workers, ZeRO-2, audited, never interrupted."""
    return run_pretrain(pretrain_config(tmp_path_factory.mktemp("runs") / "pretrain", tiny_corpus))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with fresh weights and a tokenizer that spells everything in bytes."""
    config = PretrainConfig.model_validate(pretrain_tree(Path("/r"), Path("/c")))
    texts = ["高血压是常见的慢性病。", "什么是高血压?血压持续升高。"] * 50
    tokenizer = train_tokenizer(iter(texts), config.tokenizer, "bpe")
    model = build_model(
        config.model,
        objective="clm",
        vocab_size=len(tokenizer),
        special=SpecialIds(eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id),
        seed=0,
    )
    folder = tmp_path_factory.mktemp("base")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

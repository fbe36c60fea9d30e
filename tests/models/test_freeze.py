"""Weights named by model.freeze do not train."""

from pathlib import Path
from typing import Any

import pytest
import torch

from medgpt.config.base import ConfigError
from medgpt.config.model import LoraConfig, ModelConfig
from medgpt.config.train import EngineConfig, OptimizerConfig
from medgpt.engine import Engine
from medgpt.models.freeze import freeze_weights
from medgpt.models.language_model import LanguageModel
from medgpt.models.model_shapes import model_shape
from tests.models.tiny_models import VOCAB, random_batch, tiny_config, tiny_model

PATTERNS = ("model.embed_tokens.*", "model.layers.[0-0].*")
CPU = torch.device("cpu")


def trained_engine(stage: int, *, steps: int = 3) -> Engine:
    model = tiny_model(tie_embeddings=False)
    freeze_weights(model, PATTERNS)
    engine = Engine(
        LanguageModel(model),
        engine=EngineConfig.model_validate({"zero_stage": stage}),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        total_steps=8,
        device=CPU,
    )
    for number in range(steps):
        batch = random_batch([9, 14], seed=number)
        engine.backward(engine(batch, num_tokens=batch.num_targets))
        engine.step()
    return engine


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_frozen_weights_stay_bit_equal_and_have_no_moments(stage: int, tmp_path: Path) -> None:
    before = dict(tiny_model(tie_embeddings=False).named_parameters())
    engine = trained_engine(stage)
    for name, weight in engine.module.model.named_parameters():
        frozen = name.startswith(("model.embed_tokens.", "model.layers.0."))
        assert torch.equal(weight, before[name]) == frozen, name
    files = engine.snapshot()
    stored = {key.split("/")[1] for key in files.tensors}
    assert stored == {n for n, p in engine.module.named_parameters() if p.requires_grad}
    moments = sum(t.numel() for key, t in files.tensors.items() if key.startswith("exp_avg/"))
    shape = model_shape(
        tiny_config(tie_embeddings=False).model_copy(update={"freeze": PATTERNS}),
        "clm",
        vocab_size=VOCAB,
    )
    assert moments == shape.num_trainable < shape.num_params

    files.write(tmp_path)
    resumed = trained_engine(stage, steps=0)
    resumed.load(tmp_path)
    pairs = zip(engine.module.parameters(), resumed.module.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["embed_tokens.*"], r"freeze=embed_tokens\.\*: no weight of the model has such a name"),
        (["model.layers.*", "*"], r"leaves no weight to train"),
    ],
)
def test_patterns_that_match_nothing_or_everything_are_refused(
    patterns: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        freeze_weights(tiny_model(), patterns)
    config = tiny_config().model_copy(update={"freeze": tuple(patterns)})
    with pytest.raises(ConfigError, match=message):  # what the preparation asks
        model_shape(config, "clm", vocab_size=VOCAB)


def test_freeze_goes_without_adapters() -> None:
    lora: Any = LoraConfig(rank=4)
    with pytest.raises(ValueError, match=r"lora\.rank=4 freezes all weights but the adapters"):
        ModelConfig(name="/base", freeze=("a",), lora=lora)

"""Adapters on a quantized base: what trains, what resumes, what a merge computes."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from medgpt.config.base import ConfigError
from medgpt.config.loading import validate
from medgpt.config.model import LoraConfig, ModelConfig
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.reward_model import RewardModelConfig
from medgpt.config.stages import SFTConfig
from medgpt.config.train import EngineConfig, OptimizerConfig
from medgpt.engine import Engine
from medgpt.engine.setup import ensure_process_group
from medgpt.models.language_model import LanguageModel
from medgpt.models.load import build_model
from medgpt.models.lora import apply_lora
from medgpt.models.model_files import AdapterBase
from medgpt.models.model_shapes import model_shape
from medgpt.models.quantize import keep_weights_in_place, quantized_layers
from medgpt.models.tokenizer import load_tokenizer
from medgpt.stages.merge import merge_adapter
from medgpt.train.export import export_model
from tests.models.families import FAMILIES
from tests.models.tiny_models import VOCAB, random_batch, save_model_with_tokenizer

TEXTS = ["患者患有糖尿病，血糖控制不佳。", "Hypertension: see a doctor!"] * 20
IDS = torch.tensor([[5, 9, 30, 41, 8, 60, 3, 12]])
CPU = torch.device("cpu")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    save_model_with_tokenizer(folder, TEXTS, hidden_size=64, intermediate_size=128)
    return folder


def model_config(base: Path, kind: str, **lora: Any) -> ModelConfig:
    return ModelConfig(name=str(base), lora=LoraConfig(rank=4, quantize=kind, **lora))


def adapted(config: ModelConfig, *, attention: str | None = None) -> Any:
    torch.manual_seed(0)
    model = build_model(config, head_kind="clm", seed=0)
    if attention is not None:
        model.set_attn_implementation(attention)
    return apply_lora(model, config.lora)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits


def randomize(model: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    for param in model.parameters():
        if param.requires_grad:
            param.data += 0.05 * torch.randn(param.shape, generator=generator)
    return model


def export(model: Any, config: ModelConfig, folder: Path, tokenizer: Any) -> None:
    ensure_process_group(CPU)
    export_model(model, tokenizer, folder)
    AdapterBase.of(config, torch.float32).write(folder)


# the tolerance is a share of the logits' size; int8 rounds the activations, too
@pytest.mark.parametrize(
    ("kind", "family", "tolerance"),
    [("nf4", None, 1e-5), ("nf4", "gpt-2", 1e-5), ("int8", None, 0.05)],
)
def test_a_merged_model_computes_what_the_adapters_on_the_quantized_base_do(
    base: Path, tmp_path: Path, kind: str, family: str | None, tolerance: float, capsys: Any
) -> None:
    if family is not None:
        base = FAMILIES[family].save(tmp_path / "family")
    config = model_config(base, kind)
    model = randomize(adapted(config, attention="sdpa"))
    expected = logits(model)
    folder = tmp_path / "run" / "model"
    export(model, config, folder, load_tokenizer(str(base)))
    assert not (folder / "model.safetensors").exists()  # the adapter, not the quantized base

    plain = peft.PeftModel.from_pretrained(_quantized(base, kind), str(folder))
    torch.testing.assert_close(logits(plain), expected, atol=1e-5, rtol=0)
    merge_adapter(str(tmp_path / "run"), tmp_path / "out")
    assert "dequantized" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == torch.float32
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert (logits(merged) - expected).std() < tolerance * expected.std()
    # the adapters on the base as it was saved are another model
    other = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
    assert (logits(other) - expected).std() > (0.05 if kind == "nf4" else 0) * expected.std()


def _quantized(base: Path, kind: str) -> Any:
    """Load the base as a user of transformers would."""
    settings = {"load_in_8bit": True}
    if kind == "nf4":
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        settings |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32"}
    quantization = BitsAndBytesConfig(**settings)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization)
    keep_weights_in_place(model)  # this CPU may have the kernel that computes in bf16
    return model


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(
    base: Path, tmp_path: Path, kind: str, stage: int
) -> None:
    config, batches = model_config(base, kind), [random_batch([9, 14], seed=i) for i in range(4)]
    whole = _engine(config, stage)
    losses = [_step(whole, batch) for batch in batches]

    first = _engine(config, stage)
    _step(first, batches[0])
    _step(first, batches[1])
    first.snapshot().write(tmp_path / "checkpoint")
    second = _engine(config, stage)
    second.load(tmp_path / "checkpoint")
    assert [_step(second, batch) for batch in batches[2:]] == losses[2:]
    trained, resumed = (
        {n: p.detach() for n, p in e.module.named_parameters() if p.requires_grad}
        for e in (whole, second)
    )
    assert trained.keys() == resumed.keys()
    assert all(torch.equal(trained[name], resumed[name]) for name in trained)
    assert losses[3] != losses[0]


def _engine(config: ModelConfig, stage: int) -> Engine:
    module = LanguageModel(adapted(config))
    optimizer = OptimizerConfig(learning_rate=1e-2)
    engine = EngineConfig.model_validate({"zero_stage": stage})
    return Engine(module, engine=engine, optimizer=optimizer, total_steps=8, device=CPU)


def _step(engine: Engine, batch: Any) -> float:
    engine.module.train()
    loss = engine(batch, num_tokens=batch.num_targets)
    engine.backward(loss)
    engine.step()
    engine.module.eval()
    engine(batch, num_tokens=batch.num_targets)  # a validation between the steps changes nothing
    return float(loss)


@pytest.mark.parametrize(("kind", "bytes_per_weight"), [("nf4", 0.6), ("int8", 1.1)])
def test_the_quantized_base_is_smaller_and_only_adapters_have_moments(
    base: Path, kind: str, bytes_per_weight: float
) -> None:
    module = adapted(model_config(base, kind))
    layers: list[Any] = [layer for _, layer in quantized_layers(module)]
    assert len(layers) == 2 * 7  # all linear layers, not the output layer
    stored = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    elements = sum(layer.in_features * layer.out_features for layer in layers)
    assert stored <= bytes_per_weight * elements
    names = {name for name, p in module.named_parameters() if p.requires_grad}
    assert names
    assert all(".lora_" in name for name in names)


def tree(**sections: Any) -> dict[str, Any]:
    source = {"name": "s", "paths": ["/data"], "license": "none"}
    model = {"name": "/base", "lora": {"rank": 4, "quantize": "nf4"}}
    return {"run": {"dir": "/run"}, "model": model, "data": {"sources": [source]}} | sections


def test_where_quantization_cannot_work_the_config_says_so() -> None:
    assert validate(SFTConfig, tree(engine={"zero_stage": 2})).model.lora.quantize == "nf4"
    with pytest.raises(ConfigError, match=r"quantize=nf4.*partitioned.*zero_stage to 2"):
        validate(SFTConfig, tree(engine={"zero_stage": 3}))
    with pytest.raises(ConfigError, match=r"quantize=nf4 needs adapters; set rank"):
        validate(SFTConfig, tree(model={"name": "/base", "lora": {"quantize": "nf4"}}))
    with pytest.raises(ConfigError, match=r"model\.lora\.quantize: not for reward models"):
        validate(RewardModelConfig, tree())
    with pytest.raises(ConfigError, match=r"model\.lora\.quantize=nf4: not in PPO"):
        validate(PPOStageConfig, tree(reward={"score_weight": 0.0}))


def test_experts_which_would_stay_as_they_are_are_refused(tmp_path: Path) -> None:
    folder = FAMILIES["qwen3-moe"].save(tmp_path / "moe")
    with pytest.raises(ConfigError, match=r"quantize=nf4 would leave .*experts"):
        model_shape(model_config(folder, "nf4"), "clm", vocab_size=VOCAB)

"""Models with experts load, train and are exported alike at every ZeRO stage."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from medgpt.config.model import LoraConfig, ModelConfig
from medgpt.config.train import EngineConfig, OptimizerConfig
from medgpt.data.loader.batch import PackedBatch
from medgpt.engine import Engine
from medgpt.engine.build import build_policy
from medgpt.engine.export import export_weights, gather_in_file_layout
from medgpt.engine.loading import build_partitioned
from medgpt.engine.setup import ensure_process_group
from medgpt.models.lora import merged_weights
from medgpt.models.packed import unwrap_peft
from tests.models.moe_models import CONFIGS, save_moe_model
from tests.models.tiny_models import pack

TwoRanks = Callable[..., list[Any]]
CPU = torch.device("cpu")
LORA = LoraConfig(rank=2, alpha=8)
IDS = [torch.arange(5, 17), torch.arange(40, 47)]


def read_files(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def batch() -> PackedBatch:
    return pack(IDS, [torch.cat([ids[1:], torch.tensor([-100])]) for ids in IDS])


def train(folder: Path, stage: int, lora: LoraConfig) -> tuple[list[float], Engine]:
    """Train two steps; return the losses and the engine."""
    engine_config = EngineConfig(zero_stage=stage, precision="fp32")  # type: ignore[arg-type]
    config = ModelConfig(name=str(folder), lora=lora)
    policy = build_policy(config, engine_config, CPU, seed=0, max_batch_tokens=32)
    optimizer = OptimizerConfig(learning_rate=0.01)
    engine = Engine(policy, engine=engine_config, optimizer=optimizer, total_steps=4, device=CPU)
    losses = []
    for _ in range(2):
        loss = -engine(batch())[0].mean()
        engine.backward(loss / dist.get_world_size())  # both ranks have the same batch
        engine.step()
        losses.append(float(loss))
    return losses, engine


def trained(folder: Path, stage: int, lora: LoraConfig) -> tuple[list[float], dict[str, Tensor]]:
    """Return the losses, and on rank 0 the merged weights in the layout of files."""
    losses, engine = train(folder, stage, lora)
    base = unwrap_peft(engine.module.model)
    weights = gather_in_file_layout(base, merged_weights(engine.module.model))
    return losses, {name: weight.clone() for name, weight in weights}


def all_trained(folder: Path, kinds: list[str], stages: list[int], lora: LoraConfig) -> list[Any]:
    return [[trained(folder / kind, stage, lora) for stage in stages] for kind in kinds]


@pytest.mark.parametrize("lora", [LoraConfig(), LORA], ids=["full", "lora"])
def test_zero_3_on_two_ranks_trains_experts_as_stage_0(
    tmp_path: Path, two_ranks: TwoRanks, lora: LoraConfig
) -> None:
    kinds = ["qwen3_moe", "mixtral", "deepseek_v3"]
    for kind in kinds:
        save_moe_model(kind, tmp_path / kind)
    results, _ = two_ranks(all_trained, tmp_path, kinds, [0, 2, 3], lora)
    for kind, ((losses, weights), *others) in zip(kinds, results, strict=True):
        before = read_files(tmp_path / kind)
        assert weights.keys() == before.keys()
        experts = [name for name in weights if ".experts." in name]
        assert any(not torch.equal(weights[name], before[name]) for name in experts)
        for other_losses, other_weights in others:
            assert other_losses == pytest.approx(losses, rel=1e-5)
            for name, weight in weights.items():
                torch.testing.assert_close(other_weights[name], weight, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_partitioned_model_is_exported_with_the_names_and_values_of_its_files(
    tmp_path: Path, kind: str
) -> None:
    save_moe_model(kind, tmp_path / "base")
    ensure_process_group(CPU)
    engine = EngineConfig(zero_stage=3, precision="fp32")
    model = build_partitioned(
        ModelConfig(name=str(tmp_path / "base")), engine, CPU, head_kind="clm"
    )
    export_weights(model, tmp_path / "out")
    expected, found = read_files(tmp_path / "base"), read_files(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name

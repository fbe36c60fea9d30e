"""Full, merged weights are gathered from an engine one at a time at every ZeRO stage."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from medgpt.config.model import LoraConfig
from medgpt.engine.export import gather_merged_weights
from medgpt.models.lora import apply_lora, merged_weights
from tests.engine.cases import EngineSetup, new_engine

TwoRanks = Callable[..., list[Any]]


def adapted_model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 640}  # above the size that ZeRO-3 keeps whole
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=300, **sizes, **heads))
    adapted = apply_lora(model, LoraConfig(rank=2, alpha=8))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return adapted


def gathered(stage: int) -> dict[str, Tensor]:
    engine = new_engine(EngineSetup(stage), adapted_model())
    parts = merged_weights(engine.module)
    return {name: weight.clone() for name, weight in gather_merged_weights(parts)}


@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_gather_the_merged_model_on_rank_0(two_ranks: TwoRanks, stage: int) -> None:
    weights, nothing = two_ranks(gathered, stage)
    assert nothing == {}
    merged = dict(adapted_model().merge_and_unload().named_parameters())
    assert weights.keys() == merged.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, merged[name], rtol=0, atol=1e-6)

"""Models that cannot be trained are refused by their config, before data is prepared."""

from pathlib import Path

import pytest
from transformers import CohereConfig, Qwen2Config

from medgpt.config.base import ConfigError
from medgpt.config.model import ModelConfig
from medgpt.models.model_files import load_hf_config


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = {"architectures": ["Qwen2ForCausalLM"], "quantization_config": quantization}
    Qwen2Config.from_dict(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"its weights are quantized \(fp8\).*not quantized"):
        load_hf_config(ModelConfig(name=str(tmp_path)), "clm")


def test_a_family_without_a_class_for_a_value_head_is_refused(tmp_path: Path) -> None:
    CohereConfig(architectures=["CohereForCausalLM"]).save_pretrained(tmp_path)
    load_hf_config(ModelConfig(name=str(tmp_path)), "clm")
    with pytest.raises(ConfigError, match="SequenceClassification for cohere"):
        load_hf_config(ModelConfig(name=str(tmp_path)), "value")

"""Models that cannot be trained are refused by their config, before data is prepared."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import CohereConfig, Qwen2Config

from medgpt.config.base import ConfigError
from medgpt.config.model import ModelConfig
from medgpt.models.generate import load_for_generation
from medgpt.models.model_files import load_hf_config
from medgpt.models.tokenizer import load_tokenizer
from medgpt.train.preparation import make_tokenizer
from tests.train.tiny_configs import sft_config


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


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_refused(
    base: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(base, model)
    tokenizer = load_tokenizer(str(base))
    num_ids = len(tokenizer)
    tokenizer.add_tokens(["<thought>"])
    tokenizer.save_pretrained(model)
    reason = rf"ids 0 to {num_ids}, and its embedding only {num_ids} rows"
    with pytest.raises(ConfigError, match=reason):
        make_tokenizer(str(tmp_path / "out"), sft_config(tmp_path / "run", tiny_corpus, model))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=reason):
        load_for_generation(str(model), torch.device("cpu"))

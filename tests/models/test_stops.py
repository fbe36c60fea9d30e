"""A model that medgpt writes stops in plain transformers where its chat template ends an answer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor

from medgpt.config.model import LoraConfig
from medgpt.data.tokenized.chat_template import prepare_chat_tokenizer, stop_token_ids
from medgpt.models.load import SpecialTokenIds, build_model
from medgpt.models.lora import apply_lora
from medgpt.models.stops import set_stops
from medgpt.stages.merge import merge_adapter
from tests.models.chat_tokenizers import base_tokenizer
from tests.models.tiny_models import tiny_config


class Say(LogitsProcessor):
    """Make the model say one token."""

    def __init__(self, token_id: int) -> None:
        self.token_id = token_id

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, -1e9).index_fill_(1, torch.tensor([self.token_id]), 0.0)


def base_model(tokenizer):
    """A model whose generation_config ends at the end of the text only."""
    ids = SpecialTokenIds(eos=tokenizer.eos_token_id, pad=tokenizer.eos_token_id)
    model = build_model(
        tiny_config(), head_kind="clm", vocab_size=len(tokenizer), special_ids=ids, seed=0
    )
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    return model


def answer_length(folder: Path, token_id: int) -> int:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    prompt = torch.tensor([[3, 4, 5]])
    return len(model.generate(prompt, max_new_tokens=8, logits_processor=[Say(token_id)])[0]) - 3


@pytest.mark.parametrize("family", ["qwen2.5", "glm4moe", "gpt-oss"])
def test_a_merged_model_stops_at_every_end_of_its_template(family, tmp_path):
    base = base_tokenizer(family)
    base_model(base).save_pretrained(tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    adapted = apply_lora(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(rank=2)
    )
    adapted.save_pretrained(str(tmp_path / "adapter"))
    tokenizer = prepare_chat_tokenizer(base)
    tokenizer.save_pretrained(tmp_path / "adapter")

    merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    ends = stop_token_ids(tokenizer)
    assert len(ends) > 1
    for end in ends:
        assert answer_length(tmp_path / "merged", end) == 1
    assert answer_length(tmp_path / "merged", 7) == 8
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config
    assert sorted(config.eos_token_id) == ends


def test_a_base_that_ends_at_the_end_of_text_gains_the_end_of_a_turn():
    base = base_tokenizer("qwen2.5")
    model, tokenizer = base_model(base), prepare_chat_tokenizer(base)
    set_stops(model, tokenizer)
    ends = ["<|im_end|>", "<|endoftext|>"]
    stops = model.generation_config.eos_token_id
    assert isinstance(stops, list)
    assert set(tokenizer.convert_ids_to_tokens(stops)) == set(ends)

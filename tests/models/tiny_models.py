"""Tiny models and packed batches for the tests of models/."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from medgpt.config.model import ArchitectureConfig, ModelConfig, TokenizerConfig
from medgpt.data.loader.batch import PackedBatch
from medgpt.models.load import SpecialTokenIds, build_model
from medgpt.models.tokenizer import train_tokenizer

VOCAB = 67
KINDS = ("qwen2", "llama", "bert")


def tiny_config(kind: str = "qwen2", **changes) -> ModelConfig:
    """Return a config of two layers with grouped heads (not in a bert)."""
    small = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48}
    small |= {"num_kv_heads": None if kind == "bert" else 2, "max_positions": 64}
    return ModelConfig(
        architecture=ArchitectureConfig.model_validate({"kind": kind} | small | changes)
    )


def tiny_model(
    kind: str = "qwen2", *, dtype: torch.dtype = torch.float32, **changes
) -> PreTrainedModel:
    """Return a model with fresh weights."""
    return build_model(
        tiny_config(kind, **changes),
        head_kind="mlm" if kind == "bert" else "clm",
        vocab_size=VOCAB,
        special_ids=SpecialTokenIds(bos=1, eos=2, pad=0),
        seed=0,
        dtype=dtype,
    )


def model_with_tokenizer(
    texts: Sequence[str], vocab_size: int = 400, **changes
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return a fresh causal model and its tokenizer, trained on `texts`."""
    tokenizer = train_tokenizer(iter(texts), TokenizerConfig(vocab_size=vocab_size), "bpe")
    model = build_model(
        tiny_config(**changes),
        head_kind="clm",
        vocab_size=len(tokenizer),
        special_ids=SpecialTokenIds(eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id),
        seed=0,
    )
    return model, tokenizer


def save_model_with_tokenizer(folder: Path, texts: Sequence[str], **options) -> None:
    """Save the same model and tokenizer in `folder`."""
    for part in model_with_tokenizer(texts, **options):
        part.save_pretrained(folder)


def copy_with_changed_config(model: Path, folder: Path, **changes: Any) -> Path:
    """Copy a saved model and change values in its config.json."""
    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
    return folder


def kept_ids(base: PreTrainedTokenizerFast, trimmed: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids in `base` of the tokens of `trimmed`, in the order of their new ids."""
    tokens = trimmed.convert_ids_to_tokens(list(range(len(trimmed))))
    return base.convert_tokens_to_ids(tokens)


def pack(sequences: list[Tensor], labels: list[Tensor]) -> PackedBatch:
    lengths = [len(sequence) for sequence in sequences]
    return PackedBatch(
        input_ids=torch.cat(sequences)[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        labels=torch.cat(labels)[None],
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        max_seqlen=max(lengths),
    )


def random_batch(lengths: list[int], *, ignored: float = 0.3, seed: int = 0) -> PackedBatch:
    """Return random sequences with random labels, some of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]
    labels = [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]
    drops = [torch.rand(length, generator=generator) < ignored for length in lengths]
    return pack(sequences, [torch.where(d, -100, y) for d, y in zip(drops, labels, strict=True)])

"""Counted activations against the tensors that autograd saves."""

import numpy as np
import pytest
import torch

from medgpt.data.loader.batch import PackedBatch
from medgpt.data.loader.collate import packed_batch
from medgpt.models.language_model import LanguageModel
from medgpt.models.model_shapes import ModelShape, model_shape
from medgpt.planning import activations
from medgpt.planning.activations import MicroBatch
from tests.models.tiny_models import VOCAB, tiny_config, tiny_model

TOKENS = 48
BYTES = {torch.float32: 4, torch.bfloat16: 2}


def saved_bytes(module: LanguageModel, batch: PackedBatch) -> int:
    """Return the bytes of all tensors that autograd saves, each storage once, without weights."""
    weights = {param.untyped_storage().data_ptr() for param in module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = module(batch, num_tokens=TOKENS)
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def case(kind: str, dtype: torch.dtype, **options) -> tuple[LanguageModel, ModelShape, PackedBatch]:
    module = LanguageModel(tiny_model(kind, dtype=dtype), **options)
    model = model_shape(tiny_config(kind), "mlm" if kind == "bert" else "clm", vocab_size=VOCAB)
    ids = torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(0))
    return module, model, packed_batch(ids, ids, np.array([TOKENS // 3, TOKENS - TOKENS // 3]))


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("kind", ["qwen2", "llama", "bert"])
def test_counted_activations_match_what_autograd_saves(kind: str, dtype: torch.dtype) -> None:
    module, model, batch = case(kind, dtype)
    b = BYTES[dtype]
    counted = MicroBatch(
        num_tokens=TOKENS, num_labels=TOKENS, loss_chunk_tokens=8192, activation_checkpointing=False
    )
    output = b * TOKENS * VOCAB + 4 * TOKENS  # the logits; the loss keeps a sum each
    expected = activations.saved_activations(model, counted, b) + output
    assert saved_bytes(module, batch) == pytest.approx(expected, rel=0.02)


def test_with_checkpointing_a_layer_keeps_its_input() -> None:
    module, model, batch = case("qwen2", torch.float32, activation_checkpointing=True)
    counted = MicroBatch(
        num_tokens=TOKENS, num_labels=TOKENS, loss_chunk_tokens=8192, activation_checkpointing=True
    )
    inputs = model.num_layers * TOKENS * 4 * model.hidden_size
    outside = TOKENS * activations.saved_outside_layers(model, 4)
    layer = TOKENS * activations.saved_per_layer(model, 4)
    assert activations.saved_activations(model, counted, 4) == inputs + outside + layer
    output = activations.logits_bytes(model, counted, 4) // 2
    # what else is kept is small: positions, and the state of the random generator
    assert saved_bytes(module.train(), batch) == pytest.approx(inputs + outside + output, rel=0.1)


def test_the_output_layer_needs_a_chunk_of_logits_and_its_gradient() -> None:
    _, model, _ = case("qwen2", torch.float32)
    many = MicroBatch(
        num_tokens=1000, num_labels=600, loss_chunk_tokens=256, activation_checkpointing=False
    )
    few = MicroBatch(
        num_tokens=1000, num_labels=100, loss_chunk_tokens=256, activation_checkpointing=False
    )
    assert activations.logits_bytes(model, many, 2) == 2 * 2 * 256 * VOCAB
    assert activations.logits_bytes(model, few, 2) == 2 * 2 * 100 * VOCAB


def test_the_cache_holds_keys_and_values_of_every_layer() -> None:
    _, model, _ = case("qwen2", torch.float32)
    assert activations.kv_cache_bytes(model, 10, 2) == 10 * 2 * 2 * (2 * 8) * 2

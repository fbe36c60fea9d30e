"""Parameter counts and sizes of a model from its config: no weight is read or downloaded."""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from medgpt.config.base import ModelError
from medgpt.config.model import ModelConfig
from medgpt.models.fetch import local_copy
from medgpt.models.freeze import freeze_weights
from medgpt.models.load import SpecialTokenIds, fresh_hf_config, uninitialized_model
from medgpt.models.model_files import VALUE_HEAD, HeadKind
from medgpt.models.quantize import check_quantizable

REMEDY = "name an available model of the same sizes, such as model.name=Qwen/Qwen2.5-7B"
GATE_PROJECTION = "gate_proj"  # transformers' name for the third matrix of a gated MLP


@dataclass(frozen=True, slots=True)
class WeightShape:
    """One parameter; tied parameters count once."""

    num_elements: int
    is_matrix: bool
    """Belongs to a linear layer, not to an embedding."""
    trainable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The parameters of a model, in the order of its modules, and its sizes."""

    weights: tuple[WeightShape, ...]
    num_embedding: int
    """Elements of the input embedding."""
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    has_gated_mlp: bool
    """The MLP has three matrices, as in Llama, instead of two, as in BERT."""
    vocab_size: int
    """Rows of the output layer; 1 with a value head."""
    has_tied_embeddings: bool
    """The output layer and the input embedding share their weight."""

    @property
    def num_params(self) -> int:
        return sum(weight.num_elements for weight in self.weights)

    @property
    def num_trainable(self) -> int:
        return sum(weight.num_elements for weight in self.weights if weight.trainable)

    @property
    def num_frozen(self) -> int:
        return self.num_params - self.num_trainable

    @property
    def num_decayed(self) -> int:
        """Trainable elements of matrices, the optimizer group with weight decay."""
        return sum(
            weight.num_elements for weight in self.weights if weight.trainable and weight.is_matrix
        )

    @property
    def num_matmul_params(self) -> int:
        """Parameters that every token is multiplied with: all matrices and a tied output layer."""
        head = self.hidden_size * self.vocab_size if self.has_tied_embeddings else 0
        return sum(weight.num_elements for weight in self.weights if weight.is_matrix) + head


def model_shape(
    config: ModelConfig, head_kind: HeadKind, *, vocab_size: int = 0, new_tokens: int = 0
) -> ModelShape:
    """Return the shape of the model that a stage with this config trains or runs.

    Args:
        vocab_size: of a model with fresh weights.
        new_tokens: maximum number of tokens added to the vocabulary of a saved model.

    Raises ConfigError if the model has no readable config.
    """
    key: Any = config  # frozen, so it has a hash
    return _cached_model_shape(key, head_kind, vocab_size, new_tokens)


@cache
def _cached_model_shape(
    config: ModelConfig, head_kind: HeadKind, vocab_size: int, new_tokens: int
) -> ModelShape:
    hf_config = _hf_config(config, head_kind, vocab_size, new_tokens)
    with torch.device("meta"):
        model: Any = uninitialized_model(
            hf_config, head_kind, trust_remote_code=config.trust_remote_code
        )
        freeze_weights(model, config.freeze)
        if config.lora.quantize is not None:
            check_quantizable(model, config.name or "", config.lora.quantize)
        if config.lora.rank:
            from medgpt.models.lora import apply_lora  # imports peft, which few commands need

            head = VALUE_HEAD if head_kind == "value" else None
            model = apply_lora(model, config.lora, head=head)
    text: Any = hf_config.get_text_config()
    heads = text.num_attention_heads
    tree = text.to_dict()
    return ModelShape(
        weights=tuple(_weight_shapes(model)),
        num_embedding=model.get_input_embeddings().weight.numel(),
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=tree.get("num_key_value_heads") or heads,
        head_dim=tree.get("head_dim") or text.hidden_size // heads,
        intermediate_size=text.intermediate_size,
        has_gated_mlp=any(name.endswith(GATE_PROJECTION) for name, _ in model.named_modules()),
        vocab_size=1 if head_kind == "value" else text.vocab_size,
        has_tied_embeddings=head_kind != "value" and bool(hf_config.tie_word_embeddings),
    )


def _hf_config(
    config: ModelConfig, head_kind: HeadKind, vocab_size: int, new_tokens: int
) -> PreTrainedConfig:
    if config.architecture is not None:
        return fresh_hf_config(config.architecture, vocab_size, SpecialTokenIds())
    assert config.name is not None
    if Path(config.name).is_absolute() and not Path(config.name).is_dir():
        raise ModelError(config.name, f"no such folder; {REMEDY}")
    try:
        hf_config = AutoConfig.from_pretrained(
            local_copy(config.name), trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, HFValidationError) as error:
        raise ModelError(
            config.name,
            f"the model's config cannot be read ({str(error).splitlines()[0]}); {REMEDY}",
        ) from None
    if head_kind == "value":
        hf_config.num_labels = 1
    if new_tokens:
        hf_config.get_text_config().vocab_size += new_tokens
    return hf_config


def _weight_shapes(model: nn.Module) -> list[WeightShape]:
    embeddings = {
        id(param)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for param in module.parameters()
    }
    return [
        WeightShape(
            num_elements=math.prod(param.shape),
            is_matrix=param.dim() > 1 and id(param) not in embeddings,
            trainable=param.requires_grad,
        )
        for param in model.parameters()
    ]

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
from transformers.pytorch_utils import Conv1D

from medgpt.config.base import ModelError
from medgpt.config.model import ModelConfig
from medgpt.models.fetch import local_copy
from medgpt.models.freeze import freeze_weights
from medgpt.models.layer_shapes import attention_shape, expert_shares, feed_forward_shape
from medgpt.models.load import SpecialTokenIds, fresh_hf_config, uninitialized_model
from medgpt.models.model_files import VALUE_HEAD, HeadKind
from medgpt.models.quantize import check_quantizable

REMEDY = "name an available model of the same sizes, such as model.name=Qwen/Qwen2.5-7B"
QUANTIZED_BYTES = {"nf4": 0.516, "int8": 1.0}  # of a weight, with its share of the scales


@dataclass(frozen=True, slots=True)
class WeightShape:
    """One parameter; tied parameters count once."""

    num_elements: int
    is_matrix: bool
    """Belongs to a linear layer, not to an embedding."""
    trainable: bool
    active_share: float = 1.0
    """Share of the elements that one token uses; less than 1 in experts of a mixture."""
    quantized_bytes: float | None = None
    """Bytes of an element that is kept quantized; None: it has the dtype of the model."""


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
    """Width of the feed-forward layer; of experts, of all that a token passes."""
    has_gated_mlp: bool
    """The MLP has three matrices, as in Llama, instead of two, as in BERT."""
    is_causal: bool = True
    """A token attends to those before it only."""
    vocab_size: int
    """Rows of the output layer; 1 with a value head."""
    has_tied_embeddings: bool
    """The output layer and the input embedding share their weight."""

    @property
    def num_params(self) -> int:
        return sum(weight.num_elements for weight in self.weights)

    @property
    def num_active(self) -> int:
        """Parameters that one token uses: all but the experts that it does not pass."""
        return round(sum(weight.num_elements * weight.active_share for weight in self.weights))

    def weight_bytes(self, b: int) -> float:
        """Return the bytes of all weights; b is that of a number which is not quantized."""
        return sum(weight.num_elements * (weight.quantized_bytes or b) for weight in self.weights)

    def num_used_by(self, rows: float) -> float:
        """Return the parameters that a step of `rows` independent tokens reads."""
        return sum(
            weight.num_elements * (1 - (1 - weight.active_share) ** rows) for weight in self.weights
        )

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
        """Parameters that a token is multiplied with: all matrices, of experts those that it
        passes, and a tied output layer."""
        head = self.hidden_size * self.vocab_size if self.has_tied_embeddings else 0
        used = (w.num_elements * w.active_share for w in self.weights if w.is_matrix)
        return round(sum(used)) + head


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
    text: Any = hf_config.get_text_config()
    attention = attention_shape(text)
    if attention is None:
        raise ModelError(config.name, f"a {text.model_type} has no attention heads; {REMEDY}")
    shares = expert_shares(model, text)
    layers = text.num_hidden_layers
    feed_forward = feed_forward_shape(model, text.hidden_size, layers, shares)
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    quantized = _quantized_bytes(model, config)
    model = _with_trained_part(model, config, head_kind)
    return ModelShape(
        weights=tuple(_weight_shapes(model, shares, quantized)),
        num_embedding=inputs.weight.numel(),
        hidden_size=text.hidden_size,
        num_layers=layers,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        intermediate_size=feed_forward.width,
        has_gated_mlp=feed_forward.is_gated,
        is_causal=head_kind != "mlm",
        vocab_size=1 if head_kind == "value" else text.vocab_size,
        has_tied_embeddings=outputs is not None and outputs.weight is inputs.weight,
    )


def _with_trained_part(model: Any, config: ModelConfig, head_kind: HeadKind) -> Any:
    """Freeze what the config freezes and add its adapters; raises their errors."""
    freeze_weights(model, config.freeze)
    if not config.lora.rank:
        return model
    from medgpt.models.lora import apply_lora  # imports peft, which few commands need

    with torch.device("meta"):
        return apply_lora(model, config.lora, head=VALUE_HEAD if head_kind == "value" else None)


def _quantized_bytes(model: Any, config: ModelConfig) -> dict[int, float]:
    """Map the id of each weight that model.lora.quantize quantizes to the bytes of an element."""
    kind = config.lora.quantize
    if kind is None:
        return {}
    check_quantizable(model, config.name or "", kind)
    return {
        id(module.weight): QUANTIZED_BYTES[kind]
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not model.get_output_embeddings()
    }


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


def _weight_shapes(
    model: nn.Module, shares: dict[int, float], quantized: dict[int, float]
) -> list[WeightShape]:
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
            active_share=shares.get(id(param), 1.0),
            quantized_bytes=quantized.get(id(param)),
        )
        for param in model.parameters()
    ]

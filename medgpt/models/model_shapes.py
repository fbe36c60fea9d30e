"""What a model is made of, from its configuration alone: no weight is read, downloaded or made."""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.initialization import no_init_weights

from medgpt.config.base import ConfigError
from medgpt.config.model import LoraConfig, ModelConfig
from medgpt.models.base import HEAD, Objective
from medgpt.models.fetch import local_copy
from medgpt.models.load import AUTO, SpecialIds, load_config

REMEDY = "name a model that is there and has the same sizes, as model.name=Qwen/Qwen2.5-7B"
GATE = "gate_proj"  # what transformers calls the third matrix of a gated feed-forward layer


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter; tied ones are one."""

    numel: int
    is_matrix: bool
    """Of a linear layer; not an embedding."""
    trainable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """A model's parameters, in the order of its modules, and the sizes that its forward knows."""

    weights: tuple[Weight, ...]
    embedding: int
    """Elements of the input embedding."""
    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    feed_forward: int
    gated: bool
    """The feed-forward layer has three matrices, as in Llama, not two, as in BERT."""
    vocab: int
    """Rows of the output layer; 1 for a model with a value head."""
    tied: bool
    """The output layer is the embedding."""

    @property
    def num_params(self) -> int:
        return sum(weight.numel for weight in self.weights)

    @property
    def num_trainable(self) -> int:
        return sum(weight.numel for weight in self.weights if weight.trainable)

    @property
    def num_frozen(self) -> int:
        return self.num_params - self.num_trainable

    @property
    def num_decayed(self) -> int:
        """Trainable elements of matrices, the larger one of the optimizer's groups."""
        return sum(weight.numel for weight in self.weights if weight.trainable and weight.is_matrix)

    @property
    def num_in_products(self) -> int:
        """Parameters of matrix products with every token: all matrices, and a tied output layer."""
        head = self.hidden * self.vocab if self.tied else 0
        return sum(weight.numel for weight in self.weights if weight.is_matrix) + head


def outline(
    config: ModelConfig, objective: Objective, *, vocab_size: int = 0, new_tokens: int = 0
) -> Outline:
    """The model that a stage with this config trains or runs.

    Args:
        vocab_size: of a model with fresh weights.
        new_tokens: added to a named model's vocabulary, at most.

    Raises:
        ConfigError: there is no such configuration, or it is none for this objective.
    """
    key: Any = config  # frozen, so it has a hash
    return _outline(key, objective, vocab_size, new_tokens)


@cache
def _outline(
    config: ModelConfig, objective: Objective, vocab_size: int, new_tokens: int
) -> Outline:
    hf_config = _hf_config(config, objective, vocab_size, new_tokens)
    with torch.device("meta"), no_init_weights():
        model: Any = AUTO[objective].from_config(
            hf_config, trust_remote_code=config.trust_remote_code
        )
        model.tie_weights()  # no_init_weights skips it
        if config.lora.rank:
            model = _adapted(model, config.lora, HEAD if objective == "value" else None)
    text: Any = hf_config.get_text_config()
    heads = text.num_attention_heads
    tree = text.to_dict()
    return Outline(
        weights=tuple(_weights(model)),
        embedding=model.get_input_embeddings().weight.numel(),
        hidden=text.hidden_size,
        num_layers=text.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=tree.get("num_key_value_heads") or heads,
        head_size=tree.get("head_dim") or text.hidden_size // heads,
        feed_forward=text.intermediate_size,
        gated=any(name.endswith(GATE) for name, _ in model.named_modules()),
        vocab=1 if objective == "value" else text.vocab_size,
        tied=objective != "value" and bool(hf_config.tie_word_embeddings),
    )


def _hf_config(
    config: ModelConfig, objective: Objective, vocab_size: int, new_tokens: int
) -> PreTrainedConfig:
    if config.architecture is not None:
        return load_config(config, objective=objective, vocab_size=vocab_size, special=SpecialIds())
    assert config.name is not None
    if Path(config.name).is_absolute() and not Path(config.name).is_dir():
        raise ConfigError(f"model.name={config.name}: no such folder; {REMEDY}")
    try:
        found = AutoConfig.from_pretrained(
            local_copy(config.name), trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, HFValidationError) as error:
        raise ConfigError(
            f"model.name={config.name}: no configuration of a model there "
            f"({str(error).splitlines()[0]}); {REMEDY}"
        ) from None
    if objective == "value":
        found.num_labels = 1
    if new_tokens:
        found.get_text_config().vocab_size += new_tokens
    return found


def _adapted(model: Any, lora: LoraConfig, head: str | None) -> nn.Module:
    from medgpt.models.lora import apply_lora  # imports peft, for few

    return apply_lora(model, lora, head=head)


def _weights(model: nn.Module) -> list[Weight]:
    embeddings = {
        id(param)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for param in module.parameters()
    }
    return [
        Weight(
            numel=math.prod(param.shape),
            is_matrix=param.dim() > 1 and id(param) not in embeddings,
            trainable=param.requires_grad,
        )
        for param in model.parameters()
    ]

"""Sections of the model and its tokenizer."""

from typing import Annotated, Literal, Self

from annotated_types import Ge, Gt
from pydantic import model_validator

from medgpt.config.base import Config, Count, Fraction, ModelPath


class ArchitectureConfig(Config):
    """A model with fresh weights, instead of a base model."""

    kind: Literal["qwen2", "llama", "bert"] = "qwen2"
    """qwen2 and llama: causal language models. bert: a masked language model."""
    hidden_size: Count = 256
    """Size of the hidden states."""
    num_layers: Count = 4
    """Number of transformer blocks."""
    num_heads: Count = 4
    """Number of attention heads; must divide hidden_size."""
    num_kv_heads: Count | None = None
    """Number of key-value heads; unset: num_heads, the only choice for bert."""
    intermediate_size: Count = 704
    """Hidden size of the feed-forward layer."""
    max_positions: Count = 2048
    """Maximum sequence length in tokens."""
    tie_embeddings: bool = True
    """Share one matrix between the input and the output embedding."""
    rope_theta: Annotated[float, Gt(0)] = 10000.0
    """Base of the rotary position embedding."""

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}; "
                "change one of them"
            )
        kv = self.num_kv_heads or self.num_heads
        if self.num_heads % kv or (self.kind == "bert" and kv != self.num_heads):
            raise ValueError(
                f"num_kv_heads={kv} does not fit num_heads={self.num_heads} of a {self.kind}"
            )
        return self


class LoraConfig(Config):
    rank: Annotated[int, Ge(0)] = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: Annotated[float, Gt(0)] = 32.0
    """The output of an adapter is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    """Dropout before the adapters."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers, or of the projections of experts (gate_up_proj, down_proj), to
    adapt; empty: all but the output layer and the routers of experts."""


class ModelConfig(Config):
    name: ModelPath | None = None
    """Hugging Face id, path or URI of a model, such as one that an earlier stage has written."""
    architecture: ArchitectureConfig | None = None
    """Fresh weights instead of `name`."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters."""
    attention: Literal["auto", "varlen", "flash_attention_2"] = "auto"
    """Attention over packed documents; auto: flash_attention_2 where a GPU supports it, else
    varlen."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    @model_validator(mode="after")
    def _check_one_origin(self) -> Self:
        if (self.name is None) == (self.architecture is None):
            rule = "neither is set" if self.name is None else f"both are set, name={self.name}"
            raise ValueError(
                f"set exactly one of name (a base model) and architecture (fresh weights); {rule}"
            )
        return self


class TokenizerConfig(Config):
    mode: Literal["base", "train", "extend", "trim"] = "base"
    """base: the model's own tokenizer. train: a byte-level BPE (WordPiece for bert) trained on the
    data. extend: the base tokenizer with added tokens trained on the data. trim: the base tokenizer
    without the tokens that the data does not use."""
    vocab_size: Annotated[int, Ge(300)] = 8000
    """Vocabulary size of a trained tokenizer."""
    new_tokens: Count = 2000
    """Maximum number of tokens that extend adds."""
    max_train_mb: Count = 200
    """MiB of text to train the tokenizer on, sampled evenly from all sources."""
    max_chinese_run: Count = 4
    """Maximum number of consecutive Chinese characters in a token of a trained vocabulary."""

"""The model and its tokenizer."""

from typing import Annotated, Literal, Self

from annotated_types import Ge, Gt
from pydantic import model_validator

from medgpt.config.base import Config, Count, Fraction, ModelPath


class ArchitectureConfig(Config):
    """A model with fresh weights, for when there is no base model."""

    kind: Literal["qwen2", "llama", "bert"] = "qwen2"
    """qwen2 and llama for causal, bert for masked pretraining."""
    hidden_size: Count = 256
    """Width of the residual stream."""
    num_layers: Count = 4
    """Transformer blocks."""
    num_heads: Count = 4
    """Attention heads; divides hidden_size."""
    num_kv_heads: Count | None = None
    """Key-value heads; none is num_heads. bert has no other choice."""
    intermediate_size: Count = 704
    """Width of the feed-forward layer."""
    max_positions: Count = 2048
    """Longest sequence the model accepts, in tokens."""
    tie_embeddings: bool = True
    """Input and output embedding share one matrix."""
    rope_theta: Annotated[float, Gt(0)] = 10000.0
    """Base of the rotary position encoding."""

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
    """Adapter output is scaled by alpha / rank."""
    dropout: Fraction = 0.0
    """Dropout in front of the adapters."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers to adapt; empty adapts all of them but the output layer."""


class ModelConfig(Config):
    name: ModelPath | None = None
    """Hugging Face id, or path or URI of a model, as of one written by an earlier stage."""
    architecture: ArchitectureConfig | None = None
    """Fresh weights instead of `name`."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters."""
    attention: Literal["auto", "varlen", "flash_attention_2"] = "auto"
    """How packed documents attend: auto is flash_attention_2 on a GPU that has it, else varlen."""
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
    """base: the model's own. train: byte-level BPE (WordPiece for bert) on the data. extend: the
    base's plus tokens trained on the data. trim: the base's without those the data needs not."""
    vocab_size: Annotated[int, Ge(300)] = 8000
    """Size of a trained vocabulary."""
    new_tokens: Count = 2000
    """At most this many tokens are added by extend."""
    max_train_mb: Count = 200
    """Text the tokenizer is trained on, in MiB, an even sample of all sources."""
    max_chinese_run: Count = 4
    """Longest run of Chinese characters one token of a trained vocabulary may hold."""

"""Sections of the model and its tokenizer."""

import datetime
from typing import Annotated, Literal, Self

from annotated_types import Ge, Gt
from pydantic import model_validator

from medgpt.config.base import Config, Count, Fraction, ModelPath, TemplatePath

Thinking = Literal["auto", "on", "off"]
"""Whether a model thinks before it answers, where its template has a switch; auto: its default."""
THINKING: dict[Thinking, bool | None] = {"auto": None, "on": True, "off": False}
DEFAULT_DATE = datetime.date(2024, 7, 26)
"""What the templates of Llama 3 print where they do not know the day."""


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
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732), for high ranks."""
    dora: bool = False
    """Train the length of each weight vector apart from its direction (DoRA, arXiv 2402.09353);
    ZeRO 0 to 2."""
    quantize: Literal["nf4", "int8"] | None = None
    """QLoRA (arXiv 2305.14314): keep the frozen linear layers in 4 or 8 bits. Needs bitsandbytes
    (`pip install 'medgpt[qlora]'`) and ZeRO 0 to 2; for pretraining, fine-tuning and DPO."""

    @model_validator(mode="after")
    def _check_has_adapters(self) -> Self:
        for key in ("rslora", "dora", "quantize"):
            if not self.rank and (value := self.model_dump()[key]):
                raise ValueError(
                    f"{key}={str(value).lower()} needs adapters; set rank, such as rank=16"
                )
        return self


class RopeScalingConfig(Config):
    kind: Literal["yarn", "linear"] = "yarn"
    """yarn: arXiv 2309.00071. linear: position interpolation, arXiv 2306.15595."""
    factor: Annotated[float, Gt(1)]
    """Number of positions after scaling, as a multiple of those before."""
    original_positions: Count | None = None
    """Positions before scaling; unset: max_position_embeddings of the model."""


class ModelConfig(Config):
    name: ModelPath | None = None
    """Hugging Face id, path or URI of a model, such as one that an earlier stage has written."""
    architecture: ArchitectureConfig | None = None
    """Fresh weights instead of `name`."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters."""
    freeze: tuple[str, ...] = ()
    """Weights that do not train, by their names in the model; `*` is any text:
    `["model.embed_tokens.*", "model.layers.[0-3].*"]`."""
    rope_scaling: RopeScalingConfig | None = None
    """Extend the rotary positions of the model `name`, for longer texts than it was trained on."""
    attention: Literal["auto", "varlen", "flash_attention_2"] = "auto"
    """Attention over packed documents, in all roles that read whole sequences; generation has its
    own. auto: flash_attention_2 where a GPU supports it, else varlen."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; in PPO with any model of the run."""

    def with_name(self, name: str) -> "ModelConfig":
        """Return the config of a saved model, this or another one, for another role of the run."""
        return ModelConfig(
            name=name,
            attention=self.attention,
            trust_remote_code=self.trust_remote_code,
            rope_scaling=self.rope_scaling if name == self.name else None,
        )

    @model_validator(mode="after")
    def _check_one_origin(self) -> Self:
        if (self.name is None) == (self.architecture is None):
            rule = "neither is set" if self.name is None else f"both are set, name={self.name}"
            raise ValueError(
                f"set exactly one of name (a base model) and architecture (fresh weights); {rule}"
            )
        return self

    @model_validator(mode="after")
    def _check_changes(self) -> Self:
        if self.freeze and self.lora.rank:
            raise ValueError(
                f"freeze={list(self.freeze)}: lora.rank={self.lora.rank} freezes all weights but "
                "the adapters; leave one of them out"
            )
        changes = {"lora.quantize": self.lora.quantize, "rope_scaling": self.rope_scaling}
        for key, value in changes.items():
            if self.name is None and value is not None:
                raise ValueError(f"{key} changes a base model; set name, or leave it out")
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
    chat_template: TemplatePath | None = None
    """Chat template instead of the model's own: a file ending in .jinja, or the name of one that
    TRL ships, such as qwen3_training. The exported model carries it."""
    date: datetime.date = DEFAULT_DATE
    """The day that templates print which ask for the date (Llama 3.2, gpt-oss), as YYYY-MM-DD:
    the same in training, generation and the exported model."""
    thinking: Thinking = "auto"
    """Whether prompts ask for a thought before the answer, where the template has a switch; auto:
    as the template does it by itself. The exported model carries the choice as its default."""

"""Build models with fresh weights or load saved ones. Only safetensors are read."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import BertConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config
from transformers.initialization import no_init_weights
from transformers.utils import logging
from transformers.utils.import_utils import is_flash_attn_2_available

from medgpt.config.base import ConfigError
from medgpt.config.data import Packing
from medgpt.config.model import ArchitectureConfig, ModelConfig
from medgpt.config.pools import Precision
from medgpt.models import quantize
from medgpt.models.attention import VARLEN
from medgpt.models.layout import is_packed
from medgpt.models.model_files import (
    HeadKind,
    check_max_length,
    check_no_missing_weights,
    load_hf_config,
    resolve_model_folder,
    weight_files,
)
from medgpt.models.small_model import AUTO_CLASSES
from medgpt.models.training_mode import prepare_for_training

EMBEDDING_SCALE = 2.0  # a power of two: exact in bf16


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokenIds:
    """Special token ids for the config of a fresh model."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None


def build_model(
    config: ModelConfig,
    *,
    head_kind: HeadKind,
    vocab_size: int = 0,
    special_ids: SpecialTokenIds = SpecialTokenIds(),
    seed: int,
    dtype: torch.dtype = torch.float32,
    max_length: int | None = None,
    packing: Packing = "auto",
) -> PreTrainedModel:
    """Return a model with weights on the CPU, in training mode, without dropout.

    Args:
        vocab_size, special_ids, seed: of a fresh model; a saved one has its own.
        max_length: tokens of the longest sequence; the model must have as many positions.

    Raises:
        ConfigError: model.name cannot be loaded with this head, lacks weights, has too few
            positions or is not exact, or this machine cannot run model.attention.
    """
    architecture = config.architecture
    hf_config = (
        load_hf_config(config, head_kind)
        if architecture is None
        else fresh_hf_config(architecture, vocab_size, special_ids)
    )
    check_max_length(hf_config, max_length)
    attention = training_attention(config, hf_config, head_kind, dtype=dtype, packing=packing)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    if architecture is None:
        if config.lora.quantize is not None:
            options |= quantize.loading_options(config.lora.quantize, dtype)
        model = _load_weights(config, hf_config, head_kind, **options)
        if config.lora.quantize is not None:
            quantize.keep_weights_in_place(model)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = AUTO_CLASSES[head_kind].from_config(hf_config, **options)
        _scale_initial_weights(model, architecture.num_layers)
    return prepare_for_training(model, config.name)


def build_empty_model(
    config: ModelConfig,
    *,
    head_kind: HeadKind,
    dtype: torch.dtype = torch.float32,
    attention: str | None = VARLEN,
) -> PreTrainedModel:
    """Return a saved model with uninitialized weights, as needed inside DeepSpeed's zero.Init.

    Args:
        attention: as `training_attention` returns it.
    """
    model = uninitialized_model(
        load_hf_config(config, head_kind),
        head_kind,
        dtype=dtype,
        attn_implementation=attention,
        trust_remote_code=config.trust_remote_code,
    )
    return prepare_for_training(model, config.name)


def uninitialized_model(
    hf_config: PreTrainedConfig, head_kind: HeadKind, **options: Any
) -> PreTrainedModel:
    with no_init_weights():
        model = AUTO_CLASSES[head_kind].from_config(hf_config, **options)
    model.tie_weights()  # no_init_weights skips it
    return model


def training_attention(
    config: ModelConfig,
    hf_config: PreTrainedConfig,
    head_kind: HeadKind,
    *,
    dtype: torch.dtype,
    packing: Packing,
) -> str | None:
    """Return transformers' name of the attention to train with; None: the model's default, padded.

    Raises ConfigError if the model's forward is not exact, or the attention cannot run here.
    """
    packed_attention = resolve_attention(config.attention, dtype)
    remote = config.trust_remote_code
    name = config.name
    packs = is_packed(hf_config, head_kind, packing, name=name, trust_remote_code=remote)
    return packed_attention if packs else None


def resolve_attention(attention: str, dtype: torch.dtype) -> str:
    """Return transformers' name of `model.attention`; raise ConfigError if it cannot run here."""
    has_flash = torch.cuda.is_available() and is_flash_attn_2_available()
    flash_runs = has_flash and dtype != torch.float32
    if attention == "flash_attention_2" and not flash_runs:
        raise ConfigError(
            "model.attention=flash_attention_2 needs a GPU, the package flash-attn and bf16; "
            "use auto"
        )
    return "flash_attention_2" if attention != VARLEN and flash_runs else VARLEN


def compute_dtype(precision: Precision, device_type: str) -> torch.dtype:
    """Return the dtype of weights and activations on a "cpu" or "cuda" device."""
    bf16 = device_type != "cpu" if precision == "auto" else precision == "bf16"
    return torch.bfloat16 if bf16 else torch.float32


def fresh_hf_config(
    architecture: ArchitectureConfig, vocab_size: int, special_ids: SpecialTokenIds
) -> PreTrainedConfig:
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": architecture.hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_heads,
        "intermediate_size": architecture.intermediate_size,
        "max_position_embeddings": architecture.max_positions,
        "tie_word_embeddings": architecture.tie_embeddings,
        "initializer_range": architecture.hidden_size**-0.5,  # keeps variance; 0.02 suits H = 2500
        "bos_token_id": special_ids.bos,
        "eos_token_id": special_ids.eos,
        "pad_token_id": special_ids.pad,
    }
    if architecture.kind == "bert":
        return BertConfig(**common)
    decoder = {
        "num_key_value_heads": architecture.num_kv_heads or architecture.num_heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": architecture.rope_theta},
    }
    return {"qwen2": Qwen2Config, "llama": LlamaConfig}[architecture.kind](**common, **decoder)


def _load_weights(
    config: ModelConfig, hf_config: PreTrainedConfig, head_kind: HeadKind, **options: Any
) -> PreTrainedModel:
    assert config.name is not None
    weight_files(config.name)  # its error message says more than transformers'
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # missing weights are reported below
    model, report = AUTO_CLASSES[head_kind].from_pretrained(
        resolve_model_folder(config.name),
        config=hf_config,
        use_safetensors=True,
        trust_remote_code=config.trust_remote_code,
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    logging.set_verbosity(verbosity)
    # transformers would initialize them at random
    unusable = sorted(report["missing_keys"]) + sorted(report["mismatched_keys"])
    check_no_missing_weights(config.name, unusable, head_kind)
    return model


def _scale_initial_weights(model: PreTrainedModel, num_layers: int) -> None:
    """Scale residual outputs down by depth, and embeddings up, in place.

    The residual stream then does not grow with depth (Radford et al., 2019, GPT-2). Embeddings get
    twice the matrices' standard deviation, so that tokens stand out from the first step.
    """
    model.get_input_embeddings().weight.data.mul_(EMBEDDING_SCALE)  # type: ignore[union-attr]
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # BERT normalizes after the sum
            weight.data.mul_((2 * num_layers) ** -0.5)

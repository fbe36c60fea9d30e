"""Small random models of a checkpoint's architecture, to find out how it computes.

What a model does with positions, neighbors in a batch, dropout and logits is decided by its code
and its config, not by its weights or its width. So a check needs a few narrow layers and
milliseconds, whatever the size of the checkpoint.
"""

import copy
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from medgpt.models.model_files import HeadKind

AUTO_CLASSES = {
    "clm": AutoModelForCausalLM,
    "mlm": AutoModelForMaskedLM,
    "value": AutoModelForSequenceClassification,
}
MAX_PARAMETERS = 2**26  # 256 MiB in fp32
NUM_LAYERS = 8  # hybrid models repeat their kinds of layers after at most as many
SMALL_VOCABULARY = 128
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
SPECIAL_IDS = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 4}
SIZES = {  # upper limits that no other size depends on
    "encoder_layers": 2,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "ffn_dim": 64,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "n_inner": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "sliding_window": 4,  # shorter than the texts of a check
    "attention_window": 4,
}
WIDTHS = {  # upper limits that must fit each other
    "hidden_size": 64,
    "attention_hidden_size": 64,
    "emb_dim": 64,
    "d_model": 64,
    "n_embd": 64,
    "dim": 64,
    "word_embed_proj_dim": 64,
    "embedding_size": 64,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 2,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 32),
    "mamba_d_ssm": 128,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
}
ATTEMPTS = (  # the first that works counts
    SIZES | WIDTHS,
    SIZES | WIDTHS | {"head_dim": 16, "rotary_dim": 8},
    SIZES | WIDTHS | {"head_dim": 32, "n_groups": 1},
    SIZES,
    {},
)


def small_model(
    hf_config: PreTrainedConfig,
    head_kind: HeadKind,
    probe_ids: torch.Tensor,
    *,
    model_class: Any = None,
    **options: Any,
) -> PreTrainedModel:
    """Return a model in eval mode with random fp32 weights on the CPU; it can read `probe_ids`.

    Every kind of layer of the config is kept. The weights are the same in every process.

    Args:
        probe_ids: (1, L) int64 below SMALL_VOCABULARY.
        model_class: of the model; None: the one that transformers chooses.
        options: of transformers' from_config.

    Raises:
        Exception: whatever the model raises if it cannot be built or run in any size.
    """
    build = AUTO_CLASSES[head_kind].from_config
    if model_class is not None:
        build = model_class._from_config
    for limits in ATTEMPTS:
        try:
            config = _shrink(hf_config, limits)
            model = _random_model(config, build, **options)
            with torch.no_grad():
                copy.deepcopy(model).base_model(probe_ids)  # a forward may change weights
            return model
        except Exception:  # sizes that do not fit each other raise anything
            if not limits:
                raise
    raise AssertionError("the last attempt returns or raises")


def copy_of(model: PreTrainedModel, head_kind: HeadKind, **options: Any) -> PreTrainedModel:
    """Return a model of the same config and weights, built with other options of from_config."""
    config = copy.deepcopy(model.config)
    copied = AUTO_CLASSES[head_kind].from_config(config, **options)
    copied.load_state_dict(model.state_dict())
    return copied.eval()


def _random_model(config: PreTrainedConfig, build: Any, **options: Any) -> PreTrainedModel:
    with torch.device("meta"):
        size = sum(p.numel() for p in build(config, **options).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"its smallest model has {size} parameters, too many for a check")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = build(config, dtype=torch.float32, **options)
        for weight in model.parameters():
            _randomize(weight.data)
    return model.eval()


def _randomize(weight: torch.Tensor) -> None:
    """Draw weights under which every part of a model shows in its output, in place.

    Fresh models attend almost evenly, and some of their parts are zero.
    """
    if weight.dim() > 1:
        weight.normal_(0, weight.shape[-1] ** -0.5)
    else:
        weight.add_(torch.randn_like(weight), alpha=0.1)


def _shrink(config: PreTrainedConfig, limits: dict[str, int]) -> PreTrainedConfig:
    """Return a copy whose sizes are at most `limits`."""
    if not limits:
        return copy.deepcopy(config)
    copied = type(config).from_dict(_shrink_values(config.to_dict(), limits))
    copied.name_or_path = config.name_or_path  # where remote code is found
    return copied


def _shrink_values(values: dict[str, Any], limits: dict[str, int]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            small[key] = _shrink_values(value, limits)
        elif key in SPECIAL_IDS and _is_count(value) and value >= SMALL_VOCABULARY:
            small[key] = SPECIAL_IDS[key]
        elif _is_count(value):
            limit = SMALL_VOCABULARY if "vocab_size" in key else limits.get(key, value)
            small[key] = min(value, limit)
        else:
            small[key] = value
    if values.get("num_key_value_heads") == values.get("num_attention_heads") is not None:
        small["num_key_value_heads"] = small["num_attention_heads"]
    for key in DEPTHS:
        if _is_count(values.get(key)) and values[key] > NUM_LAYERS:
            small |= _shrink_depth(values, key)
    return small


def _shrink_depth(values: dict[str, Any], key: str) -> dict[str, Any]:
    """Return changes that leave NUM_LAYERS layers, with one of each kind among them."""
    depth = values[key]
    per_layer = {k: v for k, v in values.items() if isinstance(v, list) and len(v) == depth}
    kinds = [str(kind) for kind in zip(*per_layer.values(), strict=True)] or [""] * depth
    first_of_kind = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    others = [i for i in range(depth) if i not in first_of_kind]
    kept = sorted([*first_of_kind, *others][: max(NUM_LAYERS, len(first_of_kind))])
    return {key: len(kept)} | {
        name: [layers[i] for i in kept] for name, layers in per_layer.items()
    }


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

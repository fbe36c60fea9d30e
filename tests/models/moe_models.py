"""Tiny models with experts, from transformers' config classes, with random weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

VOCAB = 96
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_TOP2 = _SIZES | {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ROUTED = _TOP2 | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
_LATENT = _ROUTED | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen3_moe": Qwen3MoeConfig(**_TOP2, num_experts=4, head_dim=8, mlp_only_layers=[0]),
    "qwen2_moe": Qwen2MoeConfig(**_TOP2, num_experts=4, shared_expert_intermediate_size=16),
    "mixtral": MixtralConfig(**_SIZES, num_local_experts=4),
    "olmoe": OlmoeConfig(**_SIZES, num_experts=4, num_experts_per_tok=2),
    "glm4_moe": Glm4MoeConfig(**_ROUTED, head_dim=8),
    "deepseek_v2": DeepseekV2Config(**_LATENT),
    "deepseek_v3": DeepseekV3Config(**_LATENT),
    "gpt_oss": GptOssConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
}


def moe_model(kind: str, **changes: Any) -> PreTrainedModel:
    config = type(CONFIGS[kind]).from_dict(CONFIGS[kind].to_dict() | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, tensor in model.state_dict().items():
        if name.endswith(("gate.weight", "router.weight")):  # small weights would give ties
            tensor.normal_()
    return model.eval()


def save_moe_model(kind: str, folder: Path, **changes: Any) -> PreTrainedModel:
    """Save a model in the layout of the hub's files; return it."""
    model = moe_model(kind, **changes)
    model.save_pretrained(folder, max_shard_size="60KB")
    return model

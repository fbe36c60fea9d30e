"""Configs of published models, shortened to what decides their size."""

from typing import Any, NamedTuple


class Published(NamedTuple):
    config: dict[str, Any]
    num_params: int
    active_billions: float | None = None
    """As published; None: all of them."""


def _sizes(hidden: int, layers: int, heads: int, kv_heads: int, wide: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": wide,
    }


PUBLISHED = {
    "Qwen3-30B-A3B": Published(
        {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            **_sizes(2048, 48, 32, 4, 6144),
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "vocab_size": 151936,
            "tie_word_embeddings": False,
        },
        30_532_122_624,
        3.3,
    ),
    "Qwen2.5-7B": Published(
        {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            **_sizes(3584, 28, 28, 4, 18944),
            "vocab_size": 152064,
            "tie_word_embeddings": False,
        },
        7_615_616_512,
    ),
    "Llama-3.1-8B": Published(
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            **_sizes(4096, 32, 32, 8, 14336),
            "vocab_size": 128256,
            "tie_word_embeddings": False,
        },
        8_030_261_248,
    ),
    "DeepSeek-V3": Published(
        {
            "model_type": "deepseek_v3",
            "architectures": ["DeepseekV3ForCausalLM"],
            **_sizes(7168, 61, 128, 128, 18432),
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 3,
            "n_group": 8,
            "topk_group": 4,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "vocab_size": 129280,
            "tie_word_embeddings": False,
        },
        671_026_404_352,  # without the layer that predicts a second token
        37,
    ),
    "Mixtral-8x7B": Published(
        {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            **_sizes(4096, 32, 32, 8, 14336),
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "vocab_size": 32000,
            "tie_word_embeddings": False,
        },
        46_702_792_704,
        12.9,
    ),
    "GLM-4-9B-0414": Published(
        {
            "model_type": "glm4",
            "architectures": ["Glm4ForCausalLM"],
            **_sizes(4096, 40, 32, 2, 13696),
            "head_dim": 128,
            "attention_bias": True,
            "vocab_size": 151552,
            "tie_word_embeddings": False,
        },
        9_400_279_040,
    ),
    "Phi-3-mini-4k": Published(
        {
            "model_type": "phi3",
            "architectures": ["Phi3ForCausalLM"],
            **_sizes(3072, 32, 32, 32, 8192),
            "vocab_size": 32064,
            "pad_token_id": 32000,
            "tie_word_embeddings": False,
        },
        3_821_079_552,
    ),
    "gemma-3-4b": Published(
        {
            "model_type": "gemma3",
            "architectures": ["Gemma3ForConditionalGeneration"],
            "mm_tokens_per_image": 256,
            "text_config": {
                "model_type": "gemma3_text",
                **_sizes(2560, 34, 8, 4, 10240),
                "head_dim": 256,
                "vocab_size": 262208,
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_attention_heads": 16,
                "num_hidden_layers": 27,
                "image_size": 896,
                "patch_size": 14,
                "vision_use_head": False,
            },
        },
        4_300_079_472,
    ),
    "gpt2": Published(
        {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_positions": 1024,
            "vocab_size": 50257,
        },
        124_439_808,
    ),
    "bloom-560m": Published(
        {
            "model_type": "bloom",
            "architectures": ["BloomForCausalLM"],
            "hidden_size": 1024,
            "n_layer": 24,
            "n_head": 16,
            "vocab_size": 250880,
        },
        559_214_592,
    ),
    "opt-125m": Published(
        {
            "model_type": "opt",
            "architectures": ["OPTForCausalLM"],
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "ffn_dim": 3072,
            "word_embed_proj_dim": 768,
            "max_position_embeddings": 2048,
            "vocab_size": 50272,
        },
        125_239_296,
    ),
    "opt-350m": Published(
        {
            "model_type": "opt",
            "architectures": ["OPTForCausalLM"],
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "ffn_dim": 4096,
            "word_embed_proj_dim": 512,
            "do_layer_norm_before": False,
            "max_position_embeddings": 2048,
            "vocab_size": 50272,
        },
        331_196_416,
    ),
    "falcon-7b": Published(
        {
            "model_type": "falcon",
            "architectures": ["FalconForCausalLM"],
            "hidden_size": 4544,
            "num_hidden_layers": 32,
            "num_attention_heads": 71,
            "multi_query": True,
            "new_decoder_architecture": False,
            "parallel_attn": True,
            "bias": False,
            "alibi": False,
            "vocab_size": 65024,
        },
        6_921_720_704,
    ),
}

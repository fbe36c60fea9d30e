"""Tiny random models of the families that users bring, saved as their hub folders look.

`FAMILIES` names them all; `Family.save` writes config, weights, tokenizer, chat template and
generation_config. Weights are drawn large enough that another token, position or neighbor changes
the logits visibly.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GenerationConfig,
    PreTrainedModel,
)

from tests.models import family_tokenizers as styles
from tests.models.chat_templates import CHAT_TEMPLATES
from tests.models.family_tokenizers import END_OF_TEXT, IM_END

POSITIONS = 512
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 16}
LATENT = SMALL | {  # DeepSeek's attention
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
ROUTED = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
GROUPS = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        config: sizes and switches for the config class of `model_type`.
        template: key of CHAT_TEMPLATES; None: the family has no chat template.
        ends: tokens at which the family's generation_config stops; None: it has no such file.
        turn_end: the token that ends an answer in the family's template.
        remote_code: the folder brings its own model class.
    """

    name: str
    model_type: str
    config: dict[str, Any]
    tokenizer: Callable[[], Any]
    template: str | None = None
    ends: tuple[str, ...] | None = None
    turn_end: str | None = None
    masked: bool = False
    remote_code: bool = False

    def save(self, folder: Path) -> Path:
        """Write the model as its hub folder looks; return `folder`."""
        tokenizer = self.tokenizer()
        if self.template is not None:
            tokenizer.chat_template = CHAT_TEMPLATES[self.template]
        folder.mkdir(parents=True)
        model = self.build(len(tokenizer), tokenizer)
        model.generation_config = GenerationConfig()
        if self.ends is not None:
            ends = tokenizer.convert_tokens_to_ids(list(self.ends))
            model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if self.ends is None:
            (folder / "generation_config.json").unlink(missing_ok=True)
        if self.remote_code:
            add_remote_code(folder)
        return folder

    def build(self, vocab_size: int, tokenizer: Any) -> PreTrainedModel:
        ids = {
            f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
            for name, token in (
                ("bos", tokenizer.bos_token),
                ("eos", tokenizer.eos_token),
                ("pad", tokenizer.pad_token),
            )
            if token is not None
        }
        config = CONFIG_MAPPING[self.model_type](
            **{
                "vocab_size": vocab_size,
                "bos_token_id": None,
                "eos_token_id": None,
                "pad_token_id": None,
            }
            | ids
            | self.config
        )
        auto = AutoModelForMaskedLM if self.masked else AutoModelForCausalLM
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = auto.from_config(config)
            spread_weights(model)
        return model.eval()


def spread_weights(model: PreTrainedModel) -> None:
    """Draw weights again, large enough for peaked attention and logits of about unit size."""
    scaled = model.config.model_type in ("gemma2", "gemma3_text", "minicpm3")  # by 8 or 12
    for name, weight in model.named_parameters():
        noise = torch.randn_like(weight)
        if "embed" in name or name.endswith(("wte.weight", "wpe.weight")):
            weight.data.copy_((0.08 if scaled else 0.7) * noise)
        elif weight.ndim > 1:
            weight.data.copy_(1.3 * weight.shape[-1] ** -0.5 * noise)
        else:  # norms and biases
            weight.data.add_(0.1 * noise)
    model.tie_weights()


def add_remote_code(folder: Path) -> None:
    """Turn a saved model into one whose class the folder itself brings."""
    (folder / "modeling_hospital.py").write_text(REMOTE_CODE, "utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config |= {"model_type": "hospital", "architectures": ["HospitalForCausalLM"]}
    path.write_text(json.dumps(config | {"auto_map": REMOTE}), "utf-8")


REMOTE_CODE = """\
from transformers import PreTrainedConfig, Qwen2Config, Qwen2ForCausalLM


class HospitalConfig(Qwen2Config):
    model_type = "hospital"


class HospitalForCausalLM(Qwen2ForCausalLM):
    config_class = HospitalConfig
"""
REMOTE = {
    "AutoConfig": "modeling_hospital.HospitalConfig",
    "AutoModelForCausalLM": "modeling_hospital.HospitalForCausalLM",
}

QWEN_ENDS = (IM_END, END_OF_TEXT)
QWEN3_5 = GROUPED | {
    "num_hidden_layers": 4,  # the fourth has full attention, the others a recurrent state
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
QWEN_MOE = GROUPED | ROUTED | {"num_experts": 4, "norm_topk_prob": True}
GEMMA_2 = GROUPED | {"query_pre_attn_scalar": 16, "sliding_window": 16}
GEMMA_3 = GEMMA_2 | {"layer_types": ["sliding_attention", "full_attention"]}
GLM_MOE = GROUPED | ROUTED | GROUPS | {"num_hidden_layers": 3, "n_group": 1}
DEEPSEEK_2 = LATENT | ROUTED | GROUPS | {"n_group": 1, "first_k_dense_replace": 1}
DEEPSEEK_3 = LATENT | ROUTED | GROUPS | {"num_hidden_layers": 3, "first_k_dense_replace": 1}
GPT_OSS = GROUPED | {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
}
MINICPM_3 = LATENT | {"dim_model_base": 16, "scale_emb": 12}
GPT_2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
BLOOM = {"hidden_size": 64, "n_layer": 2, "n_head": 4}
MISTRAL = GROUPED | {"sliding_window": 32}
PHI_3 = SMALL | {"num_key_value_heads": 2, "sliding_window": 32}
OLMO_2 = SMALL | {"num_key_value_heads": 2}
FALCON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FALCON |= {"max_position_embeddings": POSITIONS}
OPT = {k: v for k, v in SMALL.items() if k != "intermediate_size"} | {"ffn_dim": 96}
OPT |= {"word_embed_proj_dim": 64}
# RoBERTa's family counts positions from padding_idx + 1
ROBERTA = SMALL | {"type_vocab_size": 1, "max_position_embeddings": POSITIONS + 2}
DEBERTA_2 = SMALL | {
    "relative_attention": True,
    "position_biased_input": False,
    "pos_att_type": ["p2c", "c2p"],
    "max_relative_positions": 32,
    "position_buckets": 16,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "type_vocab_size": 0,
}
DEBERTA = {
    k: DEBERTA_2[k]
    for k in DEBERTA_2
    if k not in ("position_buckets", "norm_rel_ebd", "share_att_key")
}

LLAMA_3_ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
GEMMA_ENDS = ("<eos>", "<end_of_turn>")
GLM_ENDS = (END_OF_TEXT, "<|user|>", "<|observation|>")
DEEPSEEK_END = "<｜end▁of▁sentence｜>"
HARMONY_ENDS = ("<|return|>", END_OF_TEXT, "<|call|>")
EOT, EOS = "<|eot_id|>", "</s>"

CAUSAL = (
    Family("qwen2-base", "qwen2", GROUPED, styles.qwen2_base, "qwen2.5", (END_OF_TEXT,), IM_END),
    Family("qwen2.5", "qwen2", GROUPED, styles.qwen2_5, "qwen2.5", QWEN_ENDS, IM_END),
    Family("qwen3", "qwen3", GROUPED, styles.qwen3, "qwen3", QWEN_ENDS, IM_END),
    Family("qwen3-2507", "qwen3", GROUPED, styles.qwen3, "qwen3-2507", QWEN_ENDS, IM_END),
    Family("qwen3.5", "qwen3_5_text", QWEN3_5, styles.qwen3_5, "qwen3.5", QWEN_ENDS, IM_END),
    Family("qwen3.6", "qwen3_5_text", QWEN3_5, styles.qwen3_5, "qwen3.6", QWEN_ENDS, IM_END),
    Family("qwen3-moe", "qwen3_moe", QWEN_MOE, styles.qwen3, "qwen3", QWEN_ENDS, IM_END),
    Family("llama-2", "llama", SMALL, styles.llama2, "llama2", (EOS,), EOS),
    Family("llama-3", "llama", GROUPED, styles.llama3, "llama3", LLAMA_3_ENDS, EOT),
    Family("llama-3.1", "llama", GROUPED, styles.llama3, "llama3.1", LLAMA_3_ENDS, EOT),
    Family("llama-3.2", "llama", GROUPED, styles.llama3, "llama3.2", LLAMA_3_ENDS, EOT),
    Family("mistral-v0.1", "mistral", MISTRAL, styles.llama2, "mistral-v0.1", (EOS,), EOS),
    Family("mistral-v0.3", "mistral", GROUPED, styles.mistral_v3, "mistral-v0.3", (EOS,), EOS),
    Family("mistral-v7", "mistral", GROUPED, styles.mistral_v7, "mistral-v7", (EOS,), EOS),
    Family("gemma-2", "gemma2", GEMMA_2, styles.gemma, "gemma", GEMMA_ENDS, "<end_of_turn>"),
    Family("gemma-3", "gemma3_text", GEMMA_3, styles.gemma, "gemma3", GEMMA_ENDS, "<end_of_turn>"),
    Family("phi-3", "phi3", PHI_3, styles.phi3, "phi3", (END_OF_TEXT, "<|end|>"), "<|end|>"),
    Family("glm-4", "glm4", GROUPED, styles.glm4, "glm4", GLM_ENDS, "<|user|>"),
    Family("glm-4-moe", "glm4_moe", GLM_MOE, styles.glm4_moe, "glm4moe", GLM_ENDS, "<|user|>"),
    Family(
        "deepseek-v2",
        "deepseek_v2",
        DEEPSEEK_2,
        styles.deepseek,
        "deepseek-v2",
        (DEEPSEEK_END,),
        DEEPSEEK_END,
    ),
    Family(
        "deepseek-v3",
        "deepseek_v3",
        DEEPSEEK_3,
        styles.deepseek,
        "deepseek-v3",
        (DEEPSEEK_END,),
        DEEPSEEK_END,
    ),
    Family(
        "deepseek-r1-distill",
        "qwen2",
        GROUPED | {"vocab_size": 512},  # the hub's has more rows than tokens, too
        styles.deepseek,
        "deepseek-r1",
        (DEEPSEEK_END,),
        DEEPSEEK_END,
    ),
    Family(
        "remote-code",
        "qwen2",
        GROUPED,
        styles.qwen2_5,
        "qwen2.5",
        QWEN_ENDS,
        IM_END,
        remote_code=True,
    ),
    Family("gpt-oss", "gpt_oss", GPT_OSS, styles.gpt_oss, "gpt-oss", HARMONY_ENDS, "<|return|>"),
    Family("olmo-2", "olmo2", OLMO_2, styles.olmo2, "olmo2", (END_OF_TEXT,), END_OF_TEXT),
    Family("minicpm-3", "minicpm3", MINICPM_3, styles.minicpm, "minicpm3", (EOS, IM_END), IM_END),
    Family("gpt-2", "gpt2", GPT_2, styles.gpt2, None, (END_OF_TEXT,)),
    Family("bloom", "bloom", BLOOM, styles.bloom, None, (EOS,)),
    Family("falcon", "falcon", FALCON, styles.falcon, None, (END_OF_TEXT,)),
    Family("opt", "opt", OPT, styles.opt, None, (EOS,)),
    Family("biogpt", "biogpt", SMALL, styles.biogpt, None, (EOS,)),
)
MASKED = (
    Family("bert", "bert", SMALL, styles.bert, masked=True),
    Family("roberta", "roberta", ROBERTA, styles.roberta, masked=True),
    Family("xlm-r", "xlm-roberta", ROBERTA, styles.xlm_roberta, masked=True),
    Family("deberta", "deberta", DEBERTA, styles.deberta, masked=True),
    Family("deberta-v2", "deberta-v2", DEBERTA_2, styles.deberta_v2, masked=True),
)
FAMILIES = {family.name: family for family in (*CAUSAL, *MASKED)}

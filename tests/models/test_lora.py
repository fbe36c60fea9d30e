import json
import shutil

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
)

from medgpt.config.base import ConfigError
from medgpt.config.loading import validate
from medgpt.config.model import LoraConfig, TokenizerConfig
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.stages import SFTConfig
from medgpt.models.lora import apply_lora, merged_weights
from medgpt.models.tokenizer import load_tokenizer, train_tokenizer
from medgpt.models.vocabulary import extend_tokenizer, trim_tokenizer
from medgpt.models.vocabulary_change import replace_vocabulary
from medgpt.stages.merge import merge_adapter
from tests.models.families import FAMILIES
from tests.models.tiny_models import save_model_with_tokenizer

OLD = ["今天天气很好。The weather is fine today.", "病人有病，人很好。"] * 10
NEW = ["患者患有糖尿病，血糖控制不佳。", "Hypertension: see a doctor!"] * 10
TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
CONFIG = LoraConfig(rank=2, alpha=8)


def save_base(folder, *, tied=True):
    save_model_with_tokenizer(folder, OLD, tie_embeddings=tied)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer(str(folder))


def randomize(model):
    """Randomize the adapters, in place of training."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def logits(model, tokenizer, text):
    with torch.no_grad():
        return model(torch.tensor([tokenizer(text)["input_ids"]])).logits


def trainable_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}


def test_an_adapter_starts_as_the_base_and_trains_nothing_else(tmp_path):
    save_base(tmp_path)
    model, tokenizer = load(tmp_path)
    before = logits(model, tokenizer, OLD[0])
    adapted = apply_lora(model, CONFIG).eval()
    torch.testing.assert_close(logits(adapted, tokenizer, OLD[0]), before)
    assert trainable_names(adapted) == set()
    adapters = {
        name.split(".lora_")[0] for name, _ in adapted.named_parameters() if "lora_" in name
    }
    assert {name.rsplit(".", 1)[-1] for name in adapters} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }


def test_targets_choose_the_layers_and_unknown_ones_are_named(tmp_path):
    save_base(tmp_path)
    adapted = apply_lora(load(tmp_path)[0], LoraConfig(rank=2, targets=("q_proj",)))
    assert all("q_proj" in name for name, p in adapted.named_parameters() if p.requires_grad)
    with pytest.raises(ConfigError, match=r"model\.lora\.targets=\['qproj'\].*q_proj"):
        apply_lora(load(tmp_path)[0], LoraConfig(rank=2, targets=("qproj",)))


@pytest.mark.parametrize("tied", [True, False])
def test_merged_logits_are_the_adapters_with_an_extended_vocabulary(tmp_path, tied):
    save_base(tmp_path / "base", tied=tied)
    model, base = load(tmp_path / "base")
    tokenizer = extend_tokenizer(base, iter(NEW), 100)
    replace_vocabulary(model, base, tokenizer)
    new_ids = range(len(base), len(tokenizer))
    adapted = apply_lora(model, CONFIG, new_token_ids=new_ids)
    assert len(trainable_names(adapted)) == (1 if tied else 2)
    randomize(adapted)
    expected = {text: logits(adapted, tokenizer, text) for text in (OLD[0], NEW[0])}
    adapted.save_pretrained(tmp_path / "run" / "model")
    tokenizer.save_pretrained(tmp_path / "run" / "model")

    merge_adapter(str(tmp_path / "run"), tmp_path / "out")
    merged, loaded = load(tmp_path / "out")
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) == tied
    for text, want in expected.items():
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        torch.testing.assert_close(logits(merged, loaded, text), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_merged_weights_equal_those_of_the_merged_model(tmp_path, tied):
    save_base(tmp_path, tied=tied)
    model, _ = load(tmp_path)
    plain = {part.name: part.compute() for part in merged_weights(model)}
    assert plain.keys() == dict(model.named_parameters()).keys()
    adapted = randomize(apply_lora(model, CONFIG, new_token_ids=[3, 5]))
    parts = {part.name: part.compute() for part in merged_weights(adapted)}
    assert parts.keys() == plain.keys()
    merged = adapted.merge_and_unload()
    weights = dict(merged.named_parameters())
    for name, weight in parts.items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=0)
    assert any(not torch.equal(parts[name], plain[name]) for name in plain)


def test_only_the_new_rows_of_the_embedding_change(tmp_path):
    save_base(tmp_path / "base")
    model, base = load(tmp_path / "base")
    rows = model.get_input_embeddings().weight.detach().clone()
    tokenizer = extend_tokenizer(base, iter(NEW), 100)
    replace_vocabulary(model, base, tokenizer)
    adapted = randomize(apply_lora(model, CONFIG, new_token_ids=range(len(base), len(tokenizer))))
    adapted.save_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    merge_adapter(str(tmp_path / "run"), tmp_path / "out")
    merged, _ = load(tmp_path / "out")
    assert torch.equal(merged.get_input_embeddings().weight[: len(base)], rows)


def test_an_adapter_on_a_trimmed_base_merges(tmp_path):
    save_base(tmp_path / "base")
    model, base = load(tmp_path / "base")
    tokenizer = trim_tokenizer(base, iter(OLD[1:2]))
    replace_vocabulary(model, base, tokenizer)
    adapted = randomize(apply_lora(model, CONFIG))
    want = logits(adapted, tokenizer, OLD[1])
    adapted.save_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    merge_adapter(str(tmp_path / "run"), tmp_path / "out")
    merged, loaded = load(tmp_path / "out")
    torch.testing.assert_close(logits(merged, loaded, OLD[1]), want, atol=1e-4, rtol=0)


def test_an_adapter_on_an_adapter_merges(tmp_path):
    save_base(tmp_path / "base")
    model, tokenizer = load(tmp_path / "base")
    randomize(apply_lora(model, CONFIG)).save_pretrained(tmp_path / "first")
    tokenizer.save_pretrained(tmp_path / "first")
    merge_adapter(str(tmp_path / "first"), tmp_path / "merged")
    second = randomize(apply_lora(load(tmp_path / "merged")[0], CONFIG))
    want = logits(second, tokenizer, OLD[0])
    second.save_pretrained(tmp_path / "second")
    tokenizer.save_pretrained(tmp_path / "second")
    config = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "first")
    (tmp_path / "second" / "adapter_config.json").write_text(json.dumps(config))
    merge_adapter(str(tmp_path / "second"), tmp_path / "out")
    merged, loaded = load(tmp_path / "out")
    torch.testing.assert_close(logits(merged, loaded, OLD[0]), want, atol=1e-4, rtol=0)


def test_a_masked_language_model_merges(tmp_path):
    tokenizer = train_tokenizer(iter(OLD), TokenizerConfig(vocab_size=400), "wordpiece")
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **TINY)).save_pretrained(
        tmp_path / "base"
    )
    tokenizer.save_pretrained(tmp_path / "base")
    model = BertForMaskedLM.from_pretrained(tmp_path / "base").eval()
    adapted = randomize(apply_lora(model, CONFIG))
    want = logits(adapted, tokenizer, OLD[0])
    adapted.save_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    merge_adapter(str(tmp_path / "run"), tmp_path / "out")
    merged = BertForMaskedLM.from_pretrained(tmp_path / "out").eval()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(merged, loaded, OLD[0]), want, atol=1e-4, rtol=0)


def test_a_missing_base_or_adapter_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no LoRA adapters: .* no adapter_config\.json"):
        merge_adapter(str(tmp_path), tmp_path / "out")
    save_base(tmp_path / "base")
    model, tokenizer = load(tmp_path / "base")
    apply_lora(model, CONFIG).save_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    with pytest.raises(ConfigError, match="not empty"):
        merge_adapter(str(tmp_path / "run"), tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"base_model_name_or_path=.* does not exist"):
        merge_adapter(str(tmp_path / "run"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("switch", ["rslora", "dora"])
def test_variants_are_merged_as_peft_merges_them(tmp_path, switch):
    save_base(tmp_path)
    config = LoraConfig.model_validate({"rank": 4, "alpha": 8, switch: True})
    model, tokenizer = load(tmp_path)
    base = logits(model, tokenizer, OLD[0])
    adapted = apply_lora(model, config).eval()
    torch.testing.assert_close(logits(adapted, tokenizer, OLD[0]), base, atol=1e-5, rtol=0)
    randomize(adapted)
    scaling = adapted.get_submodule("base_model.model.model.layers.0.mlp.up_proj").scaling
    assert scaling["default"] == (8 / 4**0.5 if switch == "rslora" else 8 / 4)
    expected = logits(adapted, tokenizer, OLD[0])
    with adapted.disable_adapter():  # PPO's reference in the actor
        torch.testing.assert_close(logits(adapted, tokenizer, OLD[0]), base, atol=1e-5, rtol=0)
    parts = {part.name: part.compute() for part in merged_weights(adapted)}  # what PPO sends
    synced, _ = load(tmp_path)
    assert not synced.load_state_dict(parts, strict=False).unexpected_keys
    torch.testing.assert_close(logits(synced, tokenizer, OLD[0]), expected, atol=1e-5, rtol=0)
    assert (expected - base).abs().max() > 0.01
    weights = dict(adapted.merge_and_unload().named_parameters())
    for name, weight in parts.items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-6)


def test_what_dora_cannot_do_is_refused(tmp_path):
    source = {"name": "s", "paths": ["/data"], "license": "none"}
    tree = {"run": {"dir": "/run"}, "data": {"sources": [source]}}
    tree["model"] = {"name": "/base", "lora": {"rank": 4, "dora": True}}
    validate(SFTConfig, tree)
    with pytest.raises(ConfigError, match=r"dora=true.*partitioned.*zero_stage to 2"):
        validate(SFTConfig, tree | {"engine": {"zero_stage": 3}})
    ppo = tree | {"reward": {"score_weight": 0.0}}
    with pytest.raises(ConfigError, match=r"model\.lora\.dora=true.*set zero_stage=2"):
        validate(PPOStageConfig, ppo | {"pools": {"actor": {"engine": {"zero_stage": 3}}}})
    with pytest.raises(ValueError, match=r"dora=true needs adapters; set rank"):
        LoraConfig.model_validate({"dora": True})
    experts, _ = load(FAMILIES["qwen3-moe"].save(tmp_path / "moe"))
    with pytest.raises(ConfigError, match=r"dora=true cannot reach the experts"):
        apply_lora(experts, LoraConfig(rank=2, dora=True))

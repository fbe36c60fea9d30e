"""Models are built as configured; errors say why a folder is not a model."""

import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertForPreTraining, BertModel

from medgpt.config.base import ConfigError
from medgpt.config.model import ModelConfig
from medgpt.models.load import SpecialTokenIds, build_empty_model, build_model, resolve_attention
from medgpt.models.model_files import weight_files
from tests.models.tiny_models import KINDS, VOCAB, tiny_config, tiny_model

SPECIAL = SpecialTokenIds(bos=1, eos=2, pad=0)


def build(config, *, head_kind="clm", seed=0, **kwargs):
    return build_model(
        config, head_kind=head_kind, vocab_size=VOCAB, special_ids=SPECIAL, seed=seed, **kwargs
    )


def head_kind_of(kind):
    return "mlm" if kind == "bert" else "clm"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a folder with one saved model per kind."""
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        tiny_model(kind).save_pretrained(folder / kind)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_weights_are_a_function_of_the_seed(kind):
    def weights(seed):
        model = build(tiny_config(kind), head_kind=head_kind_of(kind), seed=seed)
        return torch.cat([weight.flatten() for weight in model.parameters()])

    first = weights(1)
    torch.manual_seed(5)
    state = torch.get_rng_state()

    assert torch.equal(first, weights(1))
    assert not torch.equal(first, weights(2))
    assert torch.equal(state, torch.get_rng_state())


def test_the_architecture_is_as_configured():
    model = build(tiny_config("llama", tie_embeddings=False, rope_theta=5e5))
    config = model.config

    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (32, 2, 48)
    assert config.rope_parameters["rope_theta"] == 5e5
    assert (config.vocab_size, config.max_position_embeddings) == (VOCAB, 64)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert model.generation_config.eos_token_id == 2
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.training


def test_tied_embeddings_are_one_matrix():
    model = build(tiny_config("qwen2"))

    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_residual_outputs_start_smaller_with_depth():
    layer = build(tiny_config(num_layers=8, hidden_size=64)).model.layers[0]

    assert layer.mlp.up_proj.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(64**-0.5 / 16**0.5, rel=0.1)
    assert layer.self_attn.o_proj.weight.std().item() == pytest.approx(64**-0.5 / 16**0.5, rel=0.1)


def test_bf16_keeps_the_rotary_frequencies_exact():
    exact, half = build(tiny_config()), build(tiny_config(), dtype=torch.bfloat16)

    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.model.rotary_emb.inv_freq, exact.model.rotary_emb.inv_freq)
    assert torch.equal(half.lm_head.weight, exact.lm_head.weight.bfloat16())


def test_there_is_no_dropout_and_every_token_learns():
    model = build(tiny_config("bert"), head_kind="mlm")

    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    assert model.get_input_embeddings().padding_idx is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_loads_with_equal_weights(kind, saved):
    model = build(ModelConfig(name=str(saved / kind)), head_kind=head_kind_of(kind), seed=9)

    want = tiny_model(kind).state_dict()
    assert all(torch.equal(value, want[name]) for name, value in model.state_dict().items())
    assert model.config._attn_implementation == "varlen"
    assert model.training


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_model_has_the_same_parameters_and_reads_no_weights(kind, saved, tmp_path):
    shutil.copy(saved / kind / "config.json", tmp_path)
    model = build_empty_model(
        ModelConfig(name=str(tmp_path)),
        head_kind=head_kind_of(kind),
        dtype=torch.bfloat16,
    )

    want = {name: weight.shape for name, weight in tiny_model(kind).named_parameters()}
    assert {name: weight.shape for name, weight in model.named_parameters()} == want
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_an_empty_model_can_live_on_meta(saved):
    with torch.device("meta"):
        model = build_empty_model(ModelConfig(name=str(saved / "qwen2")), head_kind="clm")

    assert all(weight.is_meta for weight in model.parameters())


def test_weight_files_lists_one_file_or_all_shards(saved, tmp_path):
    assert weight_files(str(saved / "qwen2")) == [saved / "qwen2" / "model.safetensors"]

    tiny_model().save_pretrained(tmp_path, max_shard_size="20KB")
    files = weight_files(str(tmp_path))
    assert len(files) > 1
    assert files == sorted(tmp_path.glob("*.safetensors"))

    files[0].unlink()
    with pytest.raises(ConfigError, match=files[0].name):
        weight_files(str(tmp_path))


def test_a_bert_with_a_second_head_is_a_masked_model(tmp_path, saved):
    whole = BertForPreTraining.from_pretrained(saved / "bert")
    whole.save_pretrained(tmp_path)

    model = build(ModelConfig(name=str(tmp_path)), head_kind="mlm")

    want = whole.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, want)


@pytest.mark.parametrize(
    ("kind", "head_kind", "message"),
    [
        ("bert", "clm", "BertForMaskedLM, objective.kind=clm needs BertLMHeadModel"),
        ("qwen2", "mlm", "Qwen2ForCausalLM, objective.kind=mlm needs another model"),
    ],
)
def test_a_model_with_another_head_is_refused(kind, head_kind, message, saved):
    with pytest.raises(ConfigError, match=message):
        build(ModelConfig(name=str(saved / kind)), head_kind=head_kind)


def test_a_classifier_is_no_language_model(saved, tmp_path):
    classifier = AutoModelForSequenceClassification.from_pretrained(saved / "qwen2")
    classifier.save_pretrained(tmp_path)

    with pytest.raises(ConfigError, match="Qwen2ForSequenceClassification"):
        build(ModelConfig(name=str(tmp_path)))


def test_a_missing_output_layer_is_an_error(saved, tmp_path):
    BertModel.from_pretrained(saved / "bert").save_pretrained(tmp_path)
    shutil.copy(saved / "bert" / "config.json", tmp_path)

    with pytest.raises(ConfigError, match=r"weights are missing, such as cls\.predictions"):
        build(ModelConfig(name=str(tmp_path)), head_kind="mlm")


def test_the_error_for_a_folder_without_a_model_says_what_is_missing(saved, tmp_path):
    def message(name) -> str:
        with pytest.raises(ConfigError) as caught:
            build(ModelConfig(name=str(name)))
        return str(caught.value)

    assert "no such folder" in message(tmp_path / "nothing")
    assert "has no config.json" in message(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "merge it" in message(tmp_path)
    shutil.copy(saved / "qwen2" / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never unpickled")
    assert "there is no model.safetensors" in message(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "model.name=" in message(tmp_path)
    assert "Protocol not known: nowhere" in message("nowhere://bucket/model")


def test_the_error_for_an_impossible_hub_name_says_so():
    with pytest.raises(ConfigError, match="neither a folder nor an id of the Hugging Face hub"):
        build(ModelConfig(name="no such model"))


def test_sequences_longer_than_the_models_positions_are_refused(saved):
    config = ModelConfig(name=str(saved / "bert"))

    build(config, head_kind="mlm", max_length=64)
    with pytest.raises(ConfigError, match=r"data\.max_length=65 exceeds the model's 64"):
        build(config, head_kind="mlm", max_length=65)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_flash_attention_needs_a_gpu():
    assert resolve_attention("auto", torch.bfloat16) == "varlen"
    with pytest.raises(ConfigError, match="needs a GPU"):
        resolve_attention("flash_attention_2", torch.bfloat16)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_dropout_of_a_saved_model_is_switched_off(tmp_path, kind):
    model = tiny_model(kind)
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path)
    found = build(ModelConfig(name=str(tmp_path)))
    found.set_attn_implementation("sdpa")
    ids = torch.arange(3, 30)[None]

    assert found.training
    assert torch.equal(found(ids).logits, found.eval()(ids).logits)
    assert found.config.attention_dropout == 0.5  # exports keep the base's value

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from medgpt.config.base import ConfigError
from medgpt.config.model import TokenizerConfig
from medgpt.data.sources.records import Message
from medgpt.data.tokenized import chat_template
from medgpt.models.tokenizer import train_tokenizer
from medgpt.models.vocabulary import extend_tokenizer, trim_tokenizer
from medgpt.models.vocabulary_change import replace_vocabulary
from tests.models.tiny_models import kept_ids

OLD = ["今天天气很好。The weather is fine today, user and system.", "病人有病，人很好。"] * 10
NEW = [
    "患者患有糖尿病，血糖控制不佳。糖尿病肾病123。",
    "Hypertension: see a doctor!",
    "高血压病",
] * 10
PADDING = 5


@pytest.fixture(scope="module")
def plain():
    return train_tokenizer(iter(OLD), TokenizerConfig(vocab_size=400), "bpe")


@pytest.fixture(scope="module")
def qwen2(plain, tmp_path_factory):
    """Return a tokenizer as AutoTokenizer loads it from a Qwen2 model."""
    folder = tmp_path_factory.mktemp("qwen2")
    plain.save_pretrained(folder)
    Qwen2Config().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def llama3(plain):
    """Return a tokenizer like Llama 3's: ignore_merges, begin token, added tokens outside vocab."""
    spec = json.loads(plain.backend_tokenizer.to_str())
    spec["model"]["ignore_merges"] = True
    added = [token["content"] for token in spec["added_tokens"]]
    ordered = [token for token in spec["model"]["vocab"] if token not in added]
    spec["model"]["vocab"] = {token: i for i, token in enumerate(ordered)}
    for token in spec["added_tokens"]:
        token["id"] = len(ordered) + added.index(token["content"])
    begin = spec["added_tokens"][1]
    spec["post_processor"] = {
        "type": "Sequence",
        "processors": [
            {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": False,
                "use_regex": True,
            },
            {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": begin["content"], "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [
                    {"Sequence": {"id": "A", "type_id": 0}},
                    {"Sequence": {"id": "B", "type_id": 1}},
                ],
                "special_tokens": {
                    begin["content"]: {
                        "id": begin["content"],
                        "ids": [begin["id"]],
                        "tokens": [begin["content"]],
                    }
                },
            },
        ],
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        eos_token="<|endoftext|>",
        bos_token="<|im_start|>",
        clean_up_tokenization_spaces=False,
        chat_template=plain.chat_template,
    )


@pytest.fixture(params=["qwen2", "llama3"])
def base(request):
    return request.getfixturevalue(request.param)


def tiny_model(tokenizer, *, tied=True):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + PADDING,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config).eval()


def logits(model, tokenizer, text):
    with torch.no_grad():
        return model(torch.tensor([tokenizer(text)["input_ids"]])).logits


def reload(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def test_an_extended_tokenizer_learns_words_characters_and_nothing_else(base):
    tokenizer = extend_tokenizer(base, iter(NEW), 300)
    new = [tokenizer.decode([i]) for i in range(len(base), len(tokenizer))]
    assert {"糖尿病", "血糖", "患者", "Hypertension", " doctor"} <= set(new)
    assert not [token for token in new if len(token) > 1 and any(c in ",。，:!123" for c in token)]
    assert max(len(token) for token in new if "\u4e00" <= token[0] <= "\u9fff") <= 4
    assert [
        tokenizer.decode([i])
        for i in tokenizer("糖尿病，血糖", add_special_tokens=False)["input_ids"]
    ] == [
        "糖尿病",
        "，",
        "血糖",
    ]


def test_extending_does_not_make_unreachable_old_tokens_reachable():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "bc", "abc"])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[("b", "c")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    base = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer = extend_tokenizer(base, iter(["abc", "xy"] * 5), 10)
    assert tokenizer.tokenize("abc") == base.tokenize("abc") == ["a", "bc"]
    assert tokenizer.tokenize("xy") == ["xy"]


@pytest.mark.parametrize("new_tokens", [1, 7, 40])
def test_an_extended_tokenizer_adds_at_most_new_tokens(qwen2, new_tokens):
    assert 0 < len(extend_tokenizer(qwen2, iter(NEW), new_tokens)) - len(qwen2) <= new_tokens


def test_texts_without_new_tokens_keep_their_ids_and_all_texts_decode(base, tmp_path):
    tokenizer = reload(extend_tokenizer(base, iter(NEW), 300), tmp_path)
    for text in [*OLD[:2], "<|im_start|>user\n很好<|im_end|>"]:
        assert tokenizer(text)["input_ids"] == base(text)["input_ids"]
    for text in [*NEW[:3], "☺ é 罕\n\n  "]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    for token, i in base.get_vocab().items():
        assert tokenizer.get_vocab()[token] == i
    assert tokenizer.chat_template == base.chat_template


def test_a_new_token_expands_to_the_base_tokens_that_spell_it(base):
    tokenizer = extend_tokenizer(base, iter(NEW), 300)
    model = tiny_model(base, tied=False)
    rows = model.get_input_embeddings().weight.detach().clone()
    head = model.lm_head.weight.detach().clone()
    replace_vocabulary(model, base, tokenizer)
    (new,) = tokenizer("糖尿病", add_special_tokens=False)["input_ids"]
    old = base("糖尿病", add_special_tokens=False)["input_ids"]
    assert new >= len(base)
    torch.testing.assert_close(model.get_input_embeddings().weight[new], rows[old].mean(0))
    torch.testing.assert_close(model.lm_head.weight[new], head[old].mean(0))


@pytest.mark.parametrize("tied", [True, False])
def test_extending_changes_no_old_logit(base, tied):
    tokenizer = extend_tokenizer(base, iter(NEW), 300)
    model = tiny_model(base, tied=tied)
    before = logits(model, base, OLD[0])
    report = replace_vocabulary(model, base, tokenizer)
    after = logits(model, tokenizer, OLD[0])
    assert after.shape[-1] == model.config.vocab_size == len(tokenizer)
    torch.testing.assert_close(after[..., : len(base)], before[..., : len(base)], atol=1e-5, rtol=0)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert report.num_new_tokens == len(tokenizer) - len(base)
    assert report.num_tokens == len(tokenizer)
    assert report.mean_old_tokens >= 2


def test_new_chat_tokens_fit_into_padding_rows(qwen2):
    bare = PreTrainedTokenizerFast(
        tokenizer_object=qwen2.backend_tokenizer, eos_token="<|endoftext|>"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=qwen2.backend_tokenizer, eos_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|doctor|>"]})
    model = tiny_model(bare)
    row = model.get_input_embeddings().weight[bare("<|doctor|>")["input_ids"]].mean(0)
    report = replace_vocabulary(model, bare, tokenizer)
    assert report.num_new_tokens == 1
    assert model.config.vocab_size == len(bare) + PADDING
    torch.testing.assert_close(model.get_input_embeddings().weight[len(bare)], row)


def test_an_extended_model_survives_saving(qwen2, tmp_path):
    tokenizer = extend_tokenizer(qwen2, iter(NEW), 300)
    model = tiny_model(qwen2)
    replace_vocabulary(model, qwen2, tokenizer)
    model.save_pretrained(tmp_path)
    loaded_tokenizer = reload(tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded_tokenizer(NEW[0])["input_ids"] == tokenizer(NEW[0])["input_ids"]
    torch.testing.assert_close(
        logits(loaded, loaded_tokenizer, NEW[0]), logits(model, tokenizer, NEW[0])
    )


def test_a_trimmed_tokenizer_maps_the_corpus_one_to_one(base, tmp_path):
    tokenizer = trim_tokenizer(base, iter(OLD[1:2]))
    kept = kept_ids(base, tokenizer)
    tokenizer = reload(tokenizer, tmp_path)
    assert len(tokenizer) < len(base)
    text = OLD[1]
    assert [kept[i] for i in tokenizer(text)["input_ids"]] == base(text)["input_ids"]
    talk = [Message("user", text)]
    assert [
        kept[i] for i in chat_template.generation_prompt_ids(tokenizer, talk)
    ] == chat_template.generation_prompt_ids(base, talk)
    for token in base.added_tokens_encoder:
        assert kept[tokenizer.get_vocab()[token]] == base.get_vocab()[token]
    for other in [*NEW[:3], OLD[0], "☺ é 罕"]:  # all bytes can be encoded
        ids = tokenizer(other, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == other
    assert tokenizer.eos_token == base.eos_token


@pytest.mark.parametrize("tied", [True, False])
def test_trimming_changes_no_kept_logit(base, tied, tmp_path):
    tokenizer = trim_tokenizer(base, iter(OLD[1:2]))
    kept = kept_ids(base, tokenizer)
    model = tiny_model(base, tied=tied)
    before = logits(model, base, OLD[1])[..., kept]
    assert replace_vocabulary(model, base, tokenizer).num_new_tokens == 0
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for trimmed in (model, loaded):
        assert trimmed.config.vocab_size == len(tokenizer)
        assert (trimmed.lm_head.weight is trimmed.get_input_embeddings().weight) == tied
        torch.testing.assert_close(logits(trimmed, tokenizer, OLD[1]), before)


def test_other_kinds_of_tokenizer_are_a_config_error():
    wordpiece = train_tokenizer(iter(OLD), TokenizerConfig(vocab_size=400), "wordpiece")
    with pytest.raises(ConfigError, match=r"byte-level BPE.*WordPiece"):
        extend_tokenizer(wordpiece, iter(NEW), 10)
    with pytest.raises(ConfigError, match="byte-level BPE"):
        trim_tokenizer(wordpiece, iter(NEW))

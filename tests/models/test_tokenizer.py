import random
import time
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertConfig, LlamaConfig, Qwen2Config

from medgpt.config.base import ConfigError
from medgpt.config.model import TokenizerConfig
from medgpt.models.tokenizer import (
    MAX_RUN,
    cut_long_runs,
    load_tokenizer,
    may_be_one_token,
    train_tokenizer,
)
from medgpt.models.vocabulary import extend_tokenizer
from medgpt.sample_corpus.generator import CorpusGenerator

TEXTS = [
    "患者患有2型糖尿病，血糖控制不佳。建议使用二甲双胍，并监测血糖(mmol/L)。",
    "高血压病人应低盐饮食,定期测量血压：135/85。",
    "Patients with hypertension need rest; see a doctor!\n\nCall 120.",
    "糖尿病肾病患者应控制血糖。糖尿病患者血糖高。",
] * 20
CONFIG = TokenizerConfig(vocab_size=600, max_chinese_run=2)


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(iter(TEXTS), CONFIG, "bpe")


@pytest.fixture(scope="module")
def wordpiece():
    return train_tokenizer(iter(TEXTS), CONFIG, "wordpiece")


@settings(deadline=None, max_examples=200)
@given(text=st.text())
def test_bpe_decodes_to_exactly_the_text(bpe, text):
    assert bpe.decode(bpe(text)["input_ids"]) == text


def test_bpe_keeps_both_widths_of_punctuation_and_digits_apart(bpe):
    tokens = [bpe.decode([i]) for i in bpe("血糖,血糖，135/85。")["input_ids"]]
    assert tokens == ["血糖", ",", "血糖", "，", "1", "3", "5", "/", "8", "5", "。"]


def test_bpe_tokens_are_words_of_the_text(bpe):
    tokens = [bpe.decode([i]) for i in bpe("患者 hypertension 血糖")["input_ids"]]
    assert tokens == ["患者", " hypertension", " ", "血糖"]


def test_no_bpe_token_crosses_punctuation_or_exceeds_the_chinese_run(bpe):
    learned = [bpe.decode([i]) for i in range(3 + 256, len(bpe))]
    whole = [token for token in learned if "�" not in token]
    assert all(may_be_one_token(token, CONFIG.max_chinese_run) for token in whole)
    assert "糖尿" in whole
    assert "糖尿病" not in whole
    assert all(len(token) == 1 for token in learned if "�" in token)  # a part of one character


def test_a_longer_run_is_allowed_when_configured():
    config = CONFIG.model_copy(update={"max_chinese_run": 4})
    tokenizer = train_tokenizer(iter(TEXTS), config, "bpe")
    assert "糖尿病" in [tokenizer.decode([i]) for i in range(len(tokenizer))]


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_training_depends_on_the_text_only(kind, request):
    again = train_tokenizer(reversed(TEXTS), CONFIG, kind)
    assert again.get_vocab() == request.getfixturevalue(kind).get_vocab()
    assert (
        again.backend_tokenizer.to_str() == request.getfixturevalue(kind).backend_tokenizer.to_str()
    )


def test_vocabulary_is_no_larger_than_configured():
    config = TokenizerConfig(vocab_size=320)
    assert len(train_tokenizer(iter(TEXTS), config, "bpe")) == 320
    assert len(train_tokenizer(iter(TEXTS), config, "wordpiece")) <= 320


@pytest.mark.parametrize("model_config", [None, Qwen2Config(), LlamaConfig()])
def test_auto_tokenizer_loads_the_same_bpe_beside_any_model(bpe, tmp_path, model_config):
    bpe.save_pretrained(tmp_path)
    if model_config is not None:
        model_config.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS[:4], "<|im_start|>user\n 你好。\n\n<|im_end|>\n", "，患者ab12 \t末"]:
        assert loaded(text)["input_ids"] == bpe(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.eos_token, loaded.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    assert loaded.chat_template == bpe.chat_template
    assert loaded.get_vocab() == bpe.get_vocab()


def test_auto_tokenizer_loads_the_same_wordpiece(wordpiece, tmp_path):
    wordpiece.save_pretrained(tmp_path)
    BertConfig().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS[:4]:
        assert loaded(text)["input_ids"] == wordpiece(text)["input_ids"]


def test_wordpiece_separates_chinese_characters_and_keeps_case(wordpiece):
    tokens = wordpiece.convert_ids_to_tokens(wordpiece("糖尿病Patients")["input_ids"])
    assert tokens == ["[CLS]", "糖", "尿", "病", "Patients", "[SEP]"]


def test_load_base_reads_what_training_wrote(bpe, tmp_path):
    bpe.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).get_vocab() == bpe.get_vocab()


@pytest.mark.parametrize("has_config", [False, True])
def test_a_folder_without_tokenizer_is_a_config_error(tmp_path: Path, has_config):
    if has_config:
        Qwen2Config().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.name=.*tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_end_token_is_a_config_error(bpe, tmp_path: Path):
    bpe.save_pretrained(tmp_path)
    config = (tmp_path / "tokenizer_config.json").read_text("utf-8")
    without = config.replace('"eos_token": "<|endoftext|>",', "")
    assert without != config
    (tmp_path / "tokenizer_config.json").write_text(without, "utf-8")
    with pytest.raises(ConfigError, match="no end token; set eos_token"):
        load_tokenizer(str(tmp_path))


def test_long_runs_of_every_script_are_cut_for_the_trainer():
    run = 2 * MAX_RUN + 10
    for unit in ("A", "г", "ก", "क्", "あ", "=", " ", "\n"):
        text = f"病人 x{(unit * run)[:run]}1"
        cut = cut_long_runs(text, "|")
        assert cut.replace("|", "") == text
        assert max(len(piece) for piece in cut.split("|")) <= MAX_RUN + len("病人 x")
        assert cut.count("|") == 2
    for text in ("A" * MAX_RUN, "ab, " * MAX_RUN, "1" * run, "病" * run, "a=b;" * MAX_RUN):
        assert cut_long_runs(text, "|") == text


def test_texts_without_long_runs_are_the_trainers_as_they_are():
    texts = [row["text"] for row in islice(CorpusGenerator().documents(), 500)]
    assert all(cut_long_runs(text, "|") == text for text in texts)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "extend"])
def test_training_takes_a_time_linear_in_the_longest_run(kind):
    """18 s for 200,000 letters in one run before; the limit leaves room for a busy machine."""
    dice = random.Random(0)
    dna = "".join(dice.choice("ACGT") for _ in range(200_000))
    config, started = TokenizerConfig(vocab_size=600), time.process_time()
    if kind == "extend":
        extend_tokenizer(train_tokenizer(iter(TEXTS), config, "bpe"), iter([*TEXTS, dna]), 100)
    else:
        tokenizer = train_tokenizer(iter([*TEXTS, dna]), config, kind)
        assert len(tokenizer(dna[:1000])["input_ids"]) < 700
    assert time.process_time() - started < 6

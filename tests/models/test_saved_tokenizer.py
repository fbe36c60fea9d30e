"""A saved tokenizer loads without AutoTokenizer and its imports."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from medgpt.config.model import TokenizerConfig
from medgpt.data.tokenized.chat_template import prepare_chat_tokenizer
from medgpt.models.saved_tokenizer import load_by_class_path, tokenizer_class_path
from medgpt.models.tokenizer import train_tokenizer

TEXTS = ["糖尿病的主要症状包括多饮、多尿。", "Take 500 mg twice a day.", "多饮 多尿 多食"] * 20


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_the_saved_class_loads_the_same_tokenizer_as_auto_tokenizer(tmp_path: Path, kind) -> None:
    trained = train_tokenizer(iter(TEXTS), TokenizerConfig(mode="train", vocab_size=400), kind)
    (trained if kind == "wordpiece" else prepare_chat_tokenizer(trained)).save_pretrained(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    path = tokenizer_class_path(str(tmp_path), auto)
    assert path is not None
    loaded = load_by_class_path(str(tmp_path), path)
    assert type(loaded) is type(auto)
    assert loaded(TEXTS)["input_ids"] == auto(TEXTS)["input_ids"]
    code = (
        "import sys; from medgpt.models.saved_tokenizer import load_by_class_path; "
        f"load_by_class_path({str(tmp_path)!r}, {path!r}); print('torch' in sys.modules)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert output.splitlines()[-1] == "False"


def test_a_class_that_would_load_a_different_tokenizer_is_not_used(tmp_path: Path) -> None:
    config = TokenizerConfig(mode="train", vocab_size=400)
    train_tokenizer(iter(TEXTS), config, "bpe").save_pretrained(tmp_path)
    other = train_tokenizer(iter(["alpha beta gamma"] * 20), config, "bpe")
    assert tokenizer_class_path(str(tmp_path), other) is None


def test_remote_code_classes_are_left_to_auto_tokenizer(tmp_path: Path) -> None:
    class Own(PreTrainedTokenizerFast): ...

    Own.__module__ = "transformers_modules.hospital.tokenization"
    trained = train_tokenizer(
        iter(TEXTS), TokenizerConfig(mode="train", vocab_size=400), "wordpiece"
    )
    assert (
        tokenizer_class_path(str(tmp_path), Own(tokenizer_object=trained.backend_tokenizer)) is None
    )

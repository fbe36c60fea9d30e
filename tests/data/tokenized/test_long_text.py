"""Long texts are tokenized in windows; batches and documents take bounded memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from medgpt.config.model import TokenizerConfig
from medgpt.data.sources.records import Document, Reject
from medgpt.data.tokenized import encode as encode_module
from medgpt.data.tokenized import tokenize as tokenize_module
from medgpt.data.tokenized.encode import DocumentEncoder
from medgpt.data.tokenized.long_text import tokenize_in_windows
from medgpt.models.tokenizer import train_tokenizer
from tests.bench.document_memory import write_document
from tests.data.sources.languages import TEXTS

LINES = [text for texts in TEXTS.values() for text in texts]
TEXT = "".join(f"{n}. {line}\n" for n, line in enumerate(LINES * 20))


def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer in the style of Llama 2: no words, a space before the text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>"], max_token_length=12)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.pre_tokenizer = None  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    if kind == "sentencepiece":
        return sentencepiece()
    return train_tokenizer(iter(LINES), TokenizerConfig(vocab_size=700), kind)  # pyright: ignore


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "sentencepiece"])
@pytest.mark.parametrize("window", [700, 4096])
def test_windows_give_the_tokens_of_the_whole_text(kind: str, window: int) -> None:
    tokenizer = make_tokenizer(kind)
    whole = tokenizer(
        TEXT, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    tokens = tokenize_in_windows(tokenizer, TEXT, window=window, overlap=200)
    assert tokens.ids.tolist() == whole["input_ids"]
    assert tokens.starts.tolist() == [start for start, _ in whole["offset_mapping"]]


@pytest.mark.parametrize(("kind", "objective"), [("bpe", "clm"), ("wordpiece", "mlm")])
def test_a_long_document_has_the_sample_of_a_short_one(
    monkeypatch: pytest.MonkeyPatch, kind: str, objective: str
) -> None:
    encoder = DocumentEncoder(make_tokenizer(kind), objective)  # pyright: ignore
    record = Document(text=TEXT, source="s", file="x.txt", row=1)
    whole = encoder(record)
    monkeypatch.setattr(encode_module, "WINDOW", 100)
    joined = encoder(record)
    assert not isinstance(whole, Reject)
    assert not isinstance(joined, Reject)
    assert np.array_equal(whole.input_ids, joined.input_ids)
    assert np.array_equal(whole.targets, joined.targets)
    assert (whole.word_ids is None) == (joined.word_ids is None) == (objective == "clm")
    if whole.word_ids is not None and joined.word_ids is not None:
        assert np.array_equal(whole.word_ids, joined.word_ids)


def test_a_batch_is_bounded_by_characters_and_keeps_the_order() -> None:
    lengths = [1, 2, 1 << 17, 1 << 17, 5, 1 << 20, 3, *[1] * 600]
    items = [
        Document(text="x" * length, source="s", file="x", row=row)
        for row, length in enumerate(lengths)
    ]
    batches = list(tokenize_module._batches(items))
    assert [item for batch in batches for item in batch] == items
    assert [len(batch) for batch in batches] == [3, 2, 1, 256, 256, 89]


@pytest.mark.seconds
def test_a_long_document_takes_little_memory(tmp_path: Path) -> None:
    write_document(tmp_path / "x.txt", 3 << 20)
    command = [sys.executable, "-m", "tests.bench.document_memory"]
    output = subprocess.run(
        [*command, "--child", str(tmp_path), "clm"], check=True, capture_output=True, text=True
    ).stdout
    result = json.loads(output.splitlines()[-1])
    assert result["account"]["rows"] == 1
    assert result["bytes"] < 60 * (3 << 20)  # was 170 a byte

"""Extend or trim a base model's tokenizer to fit the data.

Extending continues the base's BPE: new merges come after all old ones, so they join old tokens and
change nothing else. Trimming drops the tokens and merges that the data never uses; all bytes stay,
so any text can be encoded. Both rewrite tokenizer.json and put added tokens into the model's
vocabulary too, which keeps their ids when the file is loaded.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from medgpt.config.base import ConfigError
from medgpt.data.tokenized import chat_template
from medgpt.data.tokenized.words import han_words
from medgpt.models.tokenizer import (
    MAX_RUN,
    Merge,
    character_merges,
    frequent_characters,
    may_be_one_token,
    spell_bytes,
)

_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
_FIRST_CODE = 0x10000  # code point that stands for token 0 while merges are learned
_BREAK_CODE = ord("\n")
_SPARE_MERGES = 64  # extra merges to learn, as some are rejected
_BATCH_TEXTS = 256  # texts per call of the tokenizer


def extend_tokenizer(
    base: PreTrainedTokenizerFast,
    texts: Iterator[str],
    new_tokens: int,
    max_chinese_run: int = 4,
) -> PreTrainedTokenizerFast:
    """Add at most `new_tokens` tokens to `base`; texts without any of them keep their ids.

    Raises ConfigError if `base` is not a byte-level BPE.
    """
    corpus = list(texts)
    spelled_out = _add_characters(base, corpus, new_tokens // 2)
    return _add_words(
        spelled_out, corpus, len(base) + new_tokens - len(spelled_out), max_chinese_run
    )


def trim_tokenizer(base: PreTrainedTokenizerFast, texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Remove the tokens that `texts` do not need; the others keep their order.

    Added tokens, all bytes and the tokens of the chat template stay too. Raises ConfigError if
    `base` is not a byte-level BPE.
    """
    spec = _tokenizer_spec(base)
    vocabulary = base.get_vocab()
    used = set(base.added_tokens_encoder) | (set(_BYTE_OF) & set(vocabulary))
    names = base.convert_ids_to_tokens
    if base.chat_template is not None:
        messages = chat_template.PROBE_MESSAGES[:5]
        used.update(names(chat_template.generation_prompt_ids(base, messages)))
    for batch in _batch_texts(texts):
        ids = base(batch, add_special_tokens=True, split_special_tokens=True, verbose=False)
        used.update(names(sorted({i for row in ids["input_ids"] for i in row})))
    kept = _with_merge_sources(used, spec["model"]["merges"])
    new_id = {old: new for new, old in enumerate(sorted(vocabulary[token] for token in kept))}
    spec["model"]["vocab"] = {
        token: new_id[old] for token, old in vocabulary.items() if token in kept
    }
    spec["model"]["merges"] = [pair for pair in spec["model"]["merges"] if "".join(pair) in kept]
    for token in spec["added_tokens"]:
        token["id"] = new_id[token["id"]]
    _renumber_post_processor(spec["post_processor"], new_id)
    return _rebuild(base, spec)


def _tokenizer_spec(base: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return tokenizer.json of `base` with merges as pairs and added tokens in the vocabulary.

    Raises ConfigError if `base` is not a byte-level BPE.
    """
    spec = json.loads(base.backend_tokenizer.to_str())
    if spec["model"]["type"] != "BPE" or '"ByteLevel"' not in json.dumps(spec["pre_tokenizer"]):
        raise ConfigError(
            "tokenizer.mode=extend and trim need a byte-level BPE tokenizer, "
            f"{base.name_or_path} has a different {spec['model']['type']}; use tokenizer.mode=base "
            "or a base model like Qwen2 or Llama 3"
        )
    merges = spec["model"]["merges"]
    spec["model"]["merges"] = [tuple(m.split(" ") if isinstance(m, str) else m) for m in merges]
    spec["model"]["vocab"] = base.get_vocab()
    return spec


def _rebuild(
    base: PreTrainedTokenizerFast, spec: dict[str, Any], merges: Sequence[Merge] = ()
) -> PreTrainedTokenizerFast:
    """Reload `base` with the tokenizer.json `spec` plus `merges`."""
    vocabulary = spec["model"]["vocab"]
    next_id = max(base.get_vocab().values()) + 1
    for left, right in merges:
        spec["model"]["merges"].append((left, right))
        if left + right not in vocabulary:
            vocabulary[left + right] = next_id
            next_id += 1
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), "utf-8")
        tokenizer = type(base).from_pretrained(folder)
    tokenizer.name_or_path = base.name_or_path
    return tokenizer


def _add_characters(
    base: PreTrainedTokenizerFast, corpus: list[str], max_new: int
) -> PreTrainedTokenizerFast:
    """Add frequent characters that `base` spells with several tokens."""
    spec, vocabulary = _tokenizer_spec(base), base.get_vocab()
    model = base.backend_tokenizer.model

    def spell(character: str) -> list[str]:
        return [token.value for token in model.tokenize(spell_bytes(character))]

    # tokens that no merge of the base reaches stay unreachable: old texts keep their tokens
    split = [c for c in frequent_characters(corpus) if spell_bytes(c) not in vocabulary]
    _, merges = character_merges(split, spell, max_new)
    return _rebuild(base, spec, [merge for merge in merges if "".join(merge) not in vocabulary])


def _add_words(
    base: PreTrainedTokenizerFast, corpus: list[str], max_new: int, max_chinese_run: int
) -> PreTrainedTokenizerFast:
    """Add tokens made of several characters."""
    spec, vocabulary = _tokenizer_spec(base), base.get_vocab()
    token_of_character = {chr(_FIRST_CODE + i): token for token, i in vocabulary.items()}
    merges: list[Merge] = []
    new: set[str] = set()
    for left, right in _learn_merges(base, corpus, max_new * 5 // 4 + _SPARE_MERGES):
        if left not in token_of_character or right not in token_of_character:
            continue  # built from a rejected token
        token = token_of_character[left] + token_of_character[right]
        if token in vocabulary or not _is_trainable_token(token, max_chinese_run):
            continue  # a merge that yields an old token would change the ids of old texts
        if len(new | {token}) > max_new:
            break
        new.add(token)
        merges.append((token_of_character[left], token_of_character[right]))
        token_of_character[left + right] = token
    return _rebuild(base, spec, merges)


def _learn_merges(base: PreTrainedTokenizerFast, corpus: list[str], num_merges: int) -> list[Merge]:
    """Learn merges of the base's tokens, each token written as one character."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Split(chr(_BREAK_CODE), "removed")
    trainer = trainers.BpeTrainer(
        vocab_size=len(base) + num_merges,
        min_frequency=2,
        initial_alphabet=[chr(_FIRST_CODE + i) for i in base.get_vocab().values()],
        show_progress=False,
    )
    added = np.array(list(base.added_tokens_decoder), dtype=np.int64)
    learner.train_from_iterator(_token_strings(base, corpus, added), trainer)
    return [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]


def _token_strings(
    base: PreTrainedTokenizerFast, corpus: list[str], added: NDArray[np.int64]
) -> Iterator[str]:
    """Yield each text with one character per token and breaks between words.

    Breaks are where the base pre-tokenizes, around added tokens and between Chinese words.
    """
    for batch in _batch_texts(corpus):
        encoded = base(
            batch,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        for row, text in enumerate(batch):
            ids = np.array(encoded["input_ids"][row], dtype=np.int64)
            if len(ids) < 2:
                continue
            starts = np.array(encoded["offset_mapping"][row], dtype=np.int64)[:, 0]
            word_ids = np.array([-1 if i is None else i for i in encoded.word_ids(row)])
            word_border = np.zeros(len(text) + 1, dtype=np.bool_)
            for start, end in han_words(text):
                word_border[[start, end]] = True
            is_added = np.isin(ids, added)
            is_break = (word_ids[1:] != word_ids[:-1]) | is_added[1:] | is_added[:-1]
            is_break |= word_border[starts[1:]] & (starts[1:] != starts[:-1])
            is_break |= _breaks_in_long_runs(is_break)
            codes = np.insert(ids + _FIRST_CODE, np.flatnonzero(is_break) + 1, _BREAK_CODE)
            yield codes.astype("<u4").tobytes().decode("utf-32-le")


def _breaks_in_long_runs(is_break: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return (N - 1,) breaks between N tokens after every MAX_RUN tokens without one."""
    position = np.arange(1, len(is_break) + 1)
    last_break = np.maximum.accumulate(np.where(is_break, position, 0))
    return (position > last_break) & ((position - last_break) % MAX_RUN == 0)


def _is_trainable_token(token: str, max_chinese_run: int) -> bool:
    """Return whether a tokenizer trained on the data could have this token."""
    try:
        text = bytes(_BYTE_OF[character] for character in token).decode()
    except UnicodeDecodeError:
        return False  # ends inside a character
    return may_be_one_token(text, max_chinese_run)


def _with_merge_sources(used: set[str], merges: list[Merge]) -> set[str]:
    """Return `used` and every token from which merges build them."""
    made_from: dict[str, list[str]] = {}
    for left, right in merges:
        made_from.setdefault(left + right, []).extend((left, right))
    kept, queue = set(used), list(used)
    while queue:
        for source in made_from.get(queue.pop(), ()):
            if source not in kept:
                kept.add(source)
                queue.append(source)
    return kept


def _renumber_post_processor(post_processor: dict[str, Any] | None, new_id: dict[int, int]) -> None:
    """Renumber the token ids in the JSON of a post-processor, in place."""
    if post_processor is None or post_processor["type"] == "ByteLevel":
        return
    if post_processor["type"] == "Sequence":
        for processor in post_processor["processors"]:
            _renumber_post_processor(processor, new_id)
    elif post_processor["type"] == "TemplateProcessing":
        for token in post_processor["special_tokens"].values():
            token["ids"] = [new_id[i] for i in token["ids"]]
    else:
        raise ConfigError(
            f"tokenizer.mode=trim does not support the post-processor {post_processor['type']}; "
            "use tokenizer.mode=base"
        )


def _batch_texts(texts: Iterable[str]) -> Iterator[list[str]]:
    texts = iter(texts)
    while batch := list(islice(texts, _BATCH_TEXTS)):
        yield batch

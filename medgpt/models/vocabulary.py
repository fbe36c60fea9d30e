"""Extend or trim a base model's vocabulary to fit the data.

Extending continues the base's BPE: new merges come after all old ones, so they join old tokens and
change nothing else. Trimming drops the tokens and merges that the data never uses; all bytes stay,
so any text can be encoded. Both rewrite tokenizer.json and put added tokens into the model's
vocabulary too, which keeps their ids when the file is loaded.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from medgpt.config.base import ConfigError
from medgpt.data.tokenized import chat_template
from medgpt.data.tokenized.words import han_words
from medgpt.models.tokenizer import (
    Merge,
    character_merges,
    frequent_characters,
    may_be_one_token,
    spell_bytes,
)

_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
_FIRST_CODE = (
    0x10000  # code point of the character that stands for token 0 while merges are learned
)
_BREAK_CODE = ord("\n")
_SPARE_MERGES = 64  # extra merges to learn, as some are rejected
_BATCH_TEXTS = 256  # texts per call of the tokenizer
_SPECIAL_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, slots=True)
class VocabularyReport:
    """Size of the new vocabulary."""

    num_tokens: int
    num_new_tokens: int
    mean_old_tokens: float  # old tokens per new token


def extend_tokenizer(
    base: PreTrainedTokenizerFast,
    texts: Iterator[str],
    new_tokens: int,
    max_chinese_run: int = 4,
) -> PreTrainedTokenizerFast:
    """Add at most `new_tokens` tokens to `base`; texts without any of them keep their ids.

    Raises:
        ConfigError: `base` is not a byte-level BPE.
    """
    corpus = list(texts)
    spelled_out = _add_characters(base, corpus, new_tokens // 2)
    return _add_words(
        spelled_out, corpus, len(base) + new_tokens - len(spelled_out), max_chinese_run
    )


def trim_tokenizer(
    base: PreTrainedTokenizerFast, texts: Iterator[str]
) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """Remove the tokens that `texts` do not need; return the tokenizer and the old ids it keeps.

    Added tokens, all bytes and the tokens of the chat template stay too.

    Raises:
        ConfigError: `base` is not a byte-level BPE.
    """
    spec = _tokenizer_spec(base)
    vocabulary = base.get_vocab()
    used = set(base.added_tokens_encoder) | (set(_BYTE_OF) & set(vocabulary))
    names = base.convert_ids_to_tokens
    if base.chat_template is not None:
        used.update(
            names(chat_template.generation_prompt_ids(base, chat_template.PROBE_MESSAGES[:5]))
        )
    for batch in _batch_texts(texts):
        ids = base(batch, add_special_tokens=True, split_special_tokens=True, verbose=False)
        used.update(names(sorted({i for row in ids["input_ids"] for i in row})))
    kept = _with_merge_sources(used, spec["model"]["merges"])
    kept_ids = sorted(vocabulary[token] for token in kept)
    new_id = {old: new for new, old in enumerate(kept_ids)}
    spec["model"]["vocab"] = {
        token: new_id[old] for token, old in vocabulary.items() if token in kept
    }
    spec["model"]["merges"] = [pair for pair in spec["model"]["merges"] if "".join(pair) in kept]
    for token in spec["added_tokens"]:
        token["id"] = new_id[token["id"]]
    _renumber_post_processor(spec["post_processor"], new_id)
    return _rebuild(base, spec), kept_ids


def replace_vocabulary(
    model: PreTrainedModel,
    base_tokenizer: PreTrainedTokenizerFast,
    tokenizer: PreTrainedTokenizerFast,
) -> VocabularyReport:
    """Change the vocabulary of `model` from `base_tokenizer` to `tokenizer`, in place.

    An old token keeps its rows of the input and output embedding; a new token gets the mean of the
    rows of the old tokens that spell it. Tied embeddings stay tied.
    """
    rows = _old_ids_of_tokens(base_tokenizer, tokenizer)
    base_vocabulary, vocabulary = base_tokenizer.get_vocab(), tokenizer.get_vocab()
    new_id = {
        base_vocabulary[token]: i for token, i in vocabulary.items() if token in base_vocabulary
    }
    if all(before == after for before, after in new_id.items()):  # none trimmed: padding rows stay
        rows += [[i] for i in range(len(rows), _input_embedding(model).num_embeddings)]
        new_id = {}
    _replace_rows(model, rows)
    if new_id:
        _renumber_config(model, new_id)
    num_old_tokens = [
        len(rows[i]) for token, i in vocabulary.items() if token not in base_vocabulary
    ]
    return VocabularyReport(
        num_tokens=len(vocabulary),
        num_new_tokens=len(num_old_tokens),
        mean_old_tokens=sum(num_old_tokens) / len(num_old_tokens) if num_old_tokens else 0.0,
    )


def trim_model(model: PreTrainedModel, kept_ids: Sequence[int]) -> None:
    """Keep only these rows of the embeddings, in place, and renumber token ids in the configs."""
    _replace_rows(model, [[i] for i in kept_ids])
    _renumber_config(model, {old: new for new, old in enumerate(kept_ids)})


def _tokenizer_spec(base: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return tokenizer.json of `base` with merges as pairs and added tokens in the vocabulary.

    Raises:
        ConfigError: `base` is not a byte-level BPE.
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
            codes = np.insert(ids + _FIRST_CODE, np.flatnonzero(is_break) + 1, _BREAK_CODE)
            yield codes.astype("<u4").tobytes().decode("utf-32-le")


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


def _old_ids_of_tokens(
    base: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast
) -> list[list[int]]:
    """Return for every id of `tokenizer` the ids of `base` that spell its token."""
    vocabulary, added = base.get_vocab(), tokenizer.added_tokens_encoder
    spell = base.backend_tokenizer.model.tokenize
    rows: list[list[int]] = [[] for _ in range(max(tokenizer.get_vocab().values()) + 1)]
    for token, i in tokenizer.get_vocab().items():
        if token in vocabulary:
            rows[i] = [vocabulary[token]]
        elif token in added:
            rows[i] = base(token, add_special_tokens=False)["input_ids"]
        else:
            rows[i] = [old_token.id for old_token in spell(token)]
    return [old or [i] for i, old in enumerate(rows)]  # an id without a token keeps its row


def _replace_rows(model: PreTrainedModel, rows: list[list[int]]) -> None:
    """Set row i of the input and output embedding to the mean of the old rows `rows[i]`."""
    inputs, outputs = _input_embedding(model), model.get_output_embeddings()
    tied = outputs is not None and outputs.weight is inputs.weight
    inputs.weight = _average_rows(inputs.weight, rows)
    inputs.num_embeddings = len(rows)
    if inputs.padding_idx is not None:
        inputs.padding_idx = rows.index([inputs.padding_idx])
    if outputs is not None:
        outputs.weight = inputs.weight if tied else _average_rows(outputs.weight, rows)
        outputs.out_features = len(rows)
        if outputs.bias is not None:
            outputs.bias = _average_rows(outputs.bias, rows)
    model.config.get_text_config().vocab_size = len(rows)
    model.resize_token_embeddings(len(rows))  # updates everything else that stores the size


def _input_embedding(model: PreTrainedModel) -> nn.Embedding:
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    return embedding


def _average_rows(weight: Tensor, rows: list[list[int]]) -> nn.Parameter:
    """Return (len(rows), ...) with the means of rows of `weight` (V, ...)."""
    mean = weight.detach()[[old[0] for old in rows]]
    for i, old in enumerate(rows):
        if len(old) > 1:
            mean[i] = weight.detach()[old].float().mean(0)
    return nn.Parameter(mean, requires_grad=weight.requires_grad)


def _renumber_config(model: PreTrainedModel, new_id: dict[int, int]) -> None:
    configs: list[PreTrainedConfig | GenerationConfig] = [model.config]
    if model.can_generate():
        configs.append(model.generation_config)
    for config in configs:
        for key in _SPECIAL_ID_KEYS:
            old = getattr(config, key)
            if isinstance(old, list):
                setattr(config, key, [new_id[i] for i in old if i in new_id])
            elif old is not None:
                setattr(config, key, new_id.get(old))


def _batch_texts(texts: Iterable[str]) -> Iterator[list[str]]:
    texts = iter(texts)
    while batch := list(islice(texts, _BATCH_TEXTS)):
        yield batch

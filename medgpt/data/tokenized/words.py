"""Chinese words inside a text: for tokenizer training and for masking whole words."""

import logging
import re
from collections.abc import Iterator
from functools import cache, lru_cache

import jieba
import numpy as np
from numpy.typing import NDArray

# body of a character class, good for Python's re and for tokenizers; covers Unicode's Han script
HAN = (
    "\u2e80-\u2fdf\u3005\u3007\u3021-\u3029\u3038-\u303b"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_HAN_RUN = re.compile(f"[{HAN}]+")
_LETTERS = re.compile(rf"[^\W{HAN}]+")


def han_words(text: str) -> Iterator[tuple[int, int]]:
    """[start, end) of every Chinese word in order; no Chinese character is left out."""
    for run in _HAN_RUN.finditer(text):
        start = run.start()
        for length in _word_lengths(run.group()):
            yield start, start + length
            start += length


@lru_cache(maxsize=1 << 16)  # medical text repeats its phrases
def _word_lengths(run: str) -> tuple[int, ...]:
    return tuple(len(word) for word in _get_segmenter().cut(run))


@cache
def _get_segmenter() -> jieba.Tokenizer:
    jieba.setLogLevel(logging.WARNING)  # it reports the loading of its dictionary
    return jieba.dt


def char_word_ids(text: str) -> NDArray[np.int32]:
    """(len(text),) the word each character belongs to; a space or punctuation mark is its own."""
    is_word_start = np.ones(len(text), dtype=np.bool_)
    for start, end in han_words(text):
        is_word_start[start + 1 : end] = False
    for run in _LETTERS.finditer(text):
        is_word_start[run.start() + 1 : run.end()] = False
    return np.cumsum(is_word_start, dtype=np.int32) - 1

"""Chinese word segmentation, for tokenizer training and whole-word masking."""

import logging
import re
from collections.abc import Iterator
from functools import cache, lru_cache

import jieba
import numpy as np
from numpy.typing import NDArray

# body of a character class of Unicode's Han script, for Python's re and for tokenizers
HAN = (
    "\u2e80-\u2fdf\u3005\u3007\u3021-\u3029\u3038-\u303b"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_HAN_RUN = re.compile(f"[{HAN}]+")
_LETTERS = re.compile(rf"[^\W{HAN}]+")


def han_words(text: str) -> Iterator[tuple[int, int]]:
    """Yield [start, end) of every Chinese word, covering all Chinese characters in order."""
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
    jieba.setLogLevel(logging.WARNING)  # it logs the loading of its dictionary
    return jieba.dt


def char_word_ids(text: str) -> NDArray[np.int32]:
    """Return (len(text),) word numbers of the characters; spaces and punctuation count as words."""
    is_word_start = np.ones(len(text), dtype=np.bool_)
    for start, end in han_words(text):
        is_word_start[start + 1 : end] = False
    for run in _LETTERS.finditer(text):
        is_word_start[run.start() + 1 : run.end()] = False
    return np.cumsum(is_word_start, dtype=np.int32) - 1

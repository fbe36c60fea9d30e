"""Text helpers of the medical rules: normalization, sentences, scripts."""

import re
import unicodedata
from typing import Literal

from medgpt.data.tokenized.words import HAN

Language = Literal["zh", "en"]
HAN_CHARACTER = re.compile(f"[{HAN}]")
WORD = re.compile(r"[A-Za-z]+(?:['\u2019-][A-Za-z]+)*")
OTHER_SCRIPT = re.compile("[\u3040-\u30ff\u0400-\u04ff\u0600-\u06ff\uac00-\ud7af\u0e00-\u0e7f]")
NUMERALS = "零〇一二三四五六七八九十百千两半"
SENTENCE_END = re.compile(r"[。!?;\n]+|\.(?![\da-z])")
CLAUSE_END = re.compile(r"[,、:]")


def normalize_text(text: str) -> str:
    """Return half-width digits, letters and punctuation (NFKC); the Chinese full stop stays."""
    return unicodedata.normalize("NFKC", text).replace("\u2019", "'")


def split_sentences(text: str) -> list[str]:
    """Split normalized text into sentences, without their ends and without empty ones."""
    return [part.strip() for part in SENTENCE_END.split(text) if part.strip()]


def script_language(text: str) -> Language:
    """Return zh if the text has a Chinese character, else en."""
    return "zh" if HAN_CHARACTER.search(text) else "en"


def count_han_and_words(text: str) -> tuple[int, int]:
    """Return the numbers of Chinese characters and of words in Latin letters."""
    return len(HAN_CHARACTER.findall(text)), len(WORD.findall(text))

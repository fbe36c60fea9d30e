"""Whether an answer repeats itself, in Chinese and English.

A clause that comes again word for word is a repetition; parallel clauses and steps to be done again
are not. A question may ask for a repetition.
"""

import re
from collections import Counter
from collections.abc import Sequence

from medgpt.medical.text import HAN_CHARACTER, normalize_text

UNIT = re.compile(r"[\u4e00-\u9fff]|[a-z]+(?:'[a-z]+)?|\d+")
CLAUSE = re.compile(r"[,。!?;:\n、]+|\.(?!\d)")
OPENING = re.compile(  # may differ before a clause that is otherwise the same
    r"^\s*(?:\d+[.、)]?\s*|首先|其次|再次|最后|第[一二三四五]|然后|另外|而且|也|还|或|和|and |or "
    r"|then |first|second|third|finally|also )+",
    re.IGNORECASE,
)
ASKED_FOR = re.compile(
    r"重复|[再说念]\s?\w?遍|repeat|\b(?:twice|three times|\d times)\b", re.IGNORECASE
)
LONG_CLAUSE = 10  # units: from here a clause may not come twice
SHORT_CLAUSE = 4  # units: from here it may not come three times
LOOP = re.compile(r"(.{1,12}?)\1{3,}", re.DOTALL)  # four times without a break
MIN_LOOP_CHARS = 8
MAX_LOOP_UNITS = 40


def repeats_itself(question: str, answer: str) -> bool:
    """Return whether the answer repeats itself without being asked to."""
    if ASKED_FOR.search(normalize_text(question)):
        return False
    text = normalize_text(answer).lower()
    if any(len(m.group()) >= MIN_LOOP_CHARS for m in LOOP.finditer(re.sub(r"\s+", " ", text))):
        return True
    parts = (_split_units(OPENING.sub("", part)) for part in CLAUSE.split(text))
    clauses = [part for part in parts if part]
    if any(_is_repeated(clause, times) for clause, times in Counter(clauses).items()):
        return True
    return _repeats_clauses(clauses) or _repeats_units(_split_units(text))


def _split_units(text: str) -> tuple[str, ...]:
    """Return Chinese characters and the words of other scripts, without punctuation."""
    return tuple(UNIT.findall(text))


def _is_repeated(clause: Sequence[str], times: int) -> bool:
    num_han = sum(bool(HAN_CHARACTER.match(unit)) for unit in clause)
    length = len(clause) if num_han else 2 * len(clause)  # a word says as much as two characters
    if length >= LONG_CLAUSE:
        return times >= 2
    return length >= SHORT_CLAUSE and times >= 3 and not _has_count(clause)


def _has_count(clause: Sequence[str]) -> bool:
    """Return whether a clause has a count; such a step, as in resuscitation, is done again."""
    return any(unit.isdigit() and len(unit) <= 2 for unit in clause)


def _repeats_clauses(clauses: Sequence[tuple[str, ...]]) -> bool:
    """Return whether clauses repeat as A, B, A, B with at least four units and no counts."""
    for size in range(2, len(clauses) // 2 + 1):
        for start in range(len(clauses) - 2 * size + 1):
            first = clauses[start : start + size]
            comes_again = first == clauses[start + size : start + 2 * size]
            is_long = sum(map(len, first)) >= SHORT_CLAUSE
            if comes_again and is_long and not any(map(_has_count, first)):
                return True
    return False


def _repeats_units(units: Sequence[str]) -> bool:
    """Return whether a run of units comes three times in a row, ignoring punctuation.

    The last time may lack the word that would join it to the next.
    """
    for size in range(2, min(MAX_LOOP_UNITS, (len(units) + 1) // 3) + 1):
        num_needed = 2 * size - (size > 2)  # units that equal the one `size` before
        num_equal = 0
        for place in range(size, len(units)):
            num_equal = num_equal + 1 if units[place] == units[place - size] else 0
            if num_equal >= num_needed and not _has_count(units[place - size : place]):
                return True
    return False

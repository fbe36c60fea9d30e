"""Does an answer say the same over and over? Chinese and English.

A clause that comes back word for word repeats; parallel clauses, and steps that are done again, do
not. A question may ask for a repetition.
"""

import re
from collections import Counter
from collections.abc import Sequence

from medgpt.medical.text import HAN_CHARACTER, plain

UNIT = re.compile(r"[\u4e00-\u9fff]|[a-z]+(?:'[a-z]+)?|\d+")
CLAUSE = re.compile(r"[,。!?;:\n、]+|\.(?!\d)")
OPENING = re.compile(  # what differs in front of a clause that is the same
    r"^\s*(?:\d+[.、)]?\s*|首先|其次|再次|最后|第[一二三四五]|然后|另外|而且|也|还|或|和|and |or "
    r"|then |first|second|third|finally|also )+",
    re.IGNORECASE,
)
ASKED_FOR = re.compile(
    r"重复|[再说念]\s?\w?遍|repeat|\b(?:twice|three times|\d times)\b", re.IGNORECASE
)
LONG, SHORT = 10, 4  # units of a clause that may not come twice, or not three times
LOOP = re.compile(r"(.{1,12}?)\1{3,}", re.DOTALL)  # four times without a break
LOOP_CHARS = 8
LONGEST_LOOP = 40  # units


def repeats(question: str, answer: str) -> bool:
    """Whether the answer repeats itself without being asked to."""
    if ASKED_FOR.search(plain(question)):
        return False
    text = plain(answer).lower()
    if any(len(m.group()) >= LOOP_CHARS for m in LOOP.finditer(re.sub(r"\s+", " ", text))):
        return True
    clauses = [_units(OPENING.sub("", part)) for part in CLAUSE.split(text)]
    counts = Counter(clause for clause in clauses if clause)
    if any(_too_often(clause, times) for clause, times in counts.items()):
        return True
    return _cycles([clause for clause in clauses if clause]) or _loops(_units(text))


def _units(text: str) -> tuple[str, ...]:
    """Characters of Chinese, words of the rest, without punctuation."""
    return tuple(UNIT.findall(text))


def _too_often(clause: Sequence[str], times: int) -> bool:
    chinese = sum(bool(HAN_CHARACTER.match(unit)) for unit in clause)
    length = len(clause) if chinese else 2 * len(clause)  # a word tells as much as two characters
    if length >= LONG:
        return times >= 2
    return length >= SHORT and times >= 3 and not _counted(clause)


def _counted(clause: Sequence[str]) -> bool:
    """A step with its number of times, as in resuscitation, is done again."""
    return any(unit.isdigit() and len(unit) <= 2 for unit in clause)


def _cycles(clauses: Sequence[tuple[str, ...]]) -> bool:
    """Whether the clauses begin again: A, B, A, B with at least four units, no numbers."""
    for size in range(2, len(clauses) // 2 + 1):
        for start in range(len(clauses) - 2 * size + 1):
            first = clauses[start : start + size]
            same = first == clauses[start + size : start + 2 * size]
            if same and sum(map(len, first)) >= SHORT and not any(map(_counted, first)):
                return True
    return False


def _loops(units: Sequence[str]) -> bool:
    """Whether a run of units comes three times on end, whatever its punctuation.

    The last time may lack the word that joins it to a next one.
    """
    for size in range(2, min(LONGEST_LOOP, (len(units) + 1) // 3) + 1):
        needed = 2 * size - (size > 2)  # units that equal the one `size` before
        same = 0
        for place in range(size, len(units)):
            same = same + 1 if units[place] == units[place - size] else 0
            if same >= needed and not _counted(units[place - size : place]):
                return True
    return False

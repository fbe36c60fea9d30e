"""Light text repair: mojibake, line ends, control characters. Keeps Chinese punctuation."""

import re

import ftfy
from ftfy.badness import is_bad

FTFY_CONFIG = ftfy.TextFixerConfig(
    fix_character_width=False, uncurl_quotes=False, explain=False
)  # the first two would turn Chinese punctuation into ASCII
# Characters that ftfy may change. Most Chinese text has none, and ftfy is many times slower than
# this search.
NEEDS_REPAIR = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\xa0\xad\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\u0300-\u036f\u2028\u2029\u206a-\u206f\u2126\u212a"
    "\u212b\uf900-\ufaff\ufb00-\ufb06\ufeff\ufff9-\ufffd\ud800-\udfff]|&#?\\w{2,}"
)
# Letters and signs that it changes only in text that looks like mojibake. Not included: degree,
# plus-minus, middle dot, multiplication, micro and section sign.
ODD = "\xa1-\xa6\xa8-\xac\xae\xaf\xb2-\xb4\xb6\xb8-\xd6\xd8-\u02af\u0400-\u04ff\u2500-\u257f"
HAS_ODD = re.compile(f"[{ODD}]")
# What mojibake has, for ftfy's own test is slow: no accented letter that stands alone
MAY_BE_MOJIBAKE = re.compile(f"[{ODD}][^\x00-\x7f’]|[^\x00-\x7f’][{ODD}]|[œŒÃÂØÙ√≈‚β€]")


def clean_text(text: str) -> str:
    """Return `text` repaired and stripped."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if NEEDS_REPAIR.search(text) or _looks_like_mojibake(text):
        text = ftfy.fix_text(text, FTFY_CONFIG)
    return text.strip()


def _looks_like_mojibake(text: str) -> bool:
    if HAS_ODD.search(text) is None:
        return False
    return any(MAY_BE_MOJIBAKE.search(line) and is_bad(line) for line in text.split("\n"))

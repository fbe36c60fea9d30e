"""Light text repair: mojibake, line ends, control characters. Keeps Chinese punctuation."""

import re

import ftfy

FTFY_CONFIG = ftfy.TextFixerConfig(
    fix_character_width=False, uncurl_quotes=False, explain=False
)  # the first two would turn Chinese punctuation into ASCII
# Characters that ftfy may change. Most Chinese text has none, and ftfy is many times slower than
# this search. Not included: degree, plus-minus, middle dot, multiplication, micro and section sign.
NEEDS_REPAIR = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\xa6\xa8-\xaf\xb2-\xb4\xb6\xb8-\xd6\xd8-\u02af\u0300-\u036f\u0400-\u04ff"
    "\u2028\u2029\u206a-\u206f\u2126\u212a\u212b\u2500-\u257f\uf900-\ufaff\ufb00-\ufb06\ufeff"
    "\ufff9-\ufffd\ud800-\udfff]|&#?\\w{2,}"
)


def clean_text(text: str) -> str:
    """Return `text` repaired and stripped."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if NEEDS_REPAIR.search(text):
        text = ftfy.fix_text(text, FTFY_CONFIG)
    return text.strip()

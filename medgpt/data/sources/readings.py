"""The encodings that a text may have, and how plausible its reading in each of them is."""

import codecs
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

from medgpt.data.sources import text_cost
from medgpt.data.sources.text_cost import TextModel

FOREIGN_MARGIN = 20.0  # nats by which another encoding must be better for a single line
MAX_UNUSUAL_SHARE = 0.1  # of the characters beyond ASCII in a line, for a quick first look


@dataclass(frozen=True, slots=True)
class Candidate:
    """An encoding and the language of the text that it should give."""

    encoding: str
    model: Callable[[], TextModel]
    prior: float  # nats
    automatic: bool = False  # True: accepted without being named in the config


CANDIDATES = (
    Candidate("gb18030", text_cost.chinese, 0.5, automatic=True),
    Candidate("big5hkscs", text_cost.chinese, 1.5, automatic=True),
    *(
        Candidate(
            encoding, partial(text_cost.latin, language), prior, automatic=encoding == "cp1252"
        )
        for encoding, prior, languages in (
            ("cp1252", 1.0, text_cost.WESTERN),
            ("mac_roman", 5.0, text_cost.WESTERN),
            ("cp850", 6.0, text_cost.WESTERN),
            ("cp1250", 4.0, text_cost.CENTRAL),
            ("iso8859_2", 4.5, text_cost.CENTRAL),
            ("cp1254", 4.0, text_cost.TURKISH),
        )
        for language in languages.values()
    ),
    *(
        Candidate(encoding, partial(text_cost.alphabet, language), prior)
        for encoding, language, prior in (
            ("cp1251", "Russian", 4.0),
            ("koi8_r", "Russian", 9.0),
            ("cp866", "Russian", 9.0),
            ("cp1253", "Greek", 6.0),
            ("cp1255", "Hebrew", 6.0),
            ("cp1256", "Arabic", 6.0),
            ("cp874", "Thai", 6.0),
        )
    ),
    Candidate("cp932", text_cost.japanese, 3.0),  # Shift-JIS
    Candidate("euc_jp", text_cost.japanese, 4.0),
    Candidate("cp949", text_cost.korean, 3.0),  # EUC-KR
    Candidate("johab", text_cost.korean, 9.0),
)
UTF16_CANDIDATES = tuple(
    Candidate(encoding, model, 3.0, automatic=True)
    for encoding in ("utf-16-le", "utf-16-be")
    for model in (text_cost.chinese, partial(text_cost.latin, text_cost.WESTERN["English"]))
)
ALIASES = {  # supersets that read the same text
    "gbk": "gb18030",
    "gb2312": "gb18030",
    "big5": "big5hkscs",
    "cp950": "big5hkscs",
    "iso8859-1": "cp1252",
}
JUDGED = {c.encoding for c in CANDIDATES if c.automatic}


class Reading(NamedTuple):
    """A sample as one candidate reads it."""

    cost: float  # nats
    candidate: Candidate
    text: str
    is_plausible: bool


def rank_readings(data: bytes, candidates: Iterable[Candidate]) -> list[Reading]:
    """Return what each candidate makes of `data`, the cheapest first. Broken bytes are costly."""
    texts: dict[str, str] = {}
    readings: list[Reading] = []
    for candidate in candidates:
        if candidate.encoding not in texts:
            texts[candidate.encoding] = data.decode(candidate.encoding, "replace")
        text, model = texts[candidate.encoding], candidate.model()
        cost = model.cost(text) + candidate.prior
        readings.append(Reading(cost, candidate, text, _is_plausible(text, model)))
    return sorted(readings, key=lambda reading: reading.cost)


def _is_plausible(text: str, model: TextModel) -> bool:
    """Whether a text is plausible, apart from a few lines with broken bytes."""
    lines = text.split("\n")
    whole = [line for line in lines if "\ufffd" not in line]
    kept = whole if 2 * len(whole) >= len(lines) else lines
    return model.mean_cost("\n".join(kept)) <= model.plausible


def foreign_encoding(data: bytes, encoding: str) -> str | None:
    """Return the encoding that `data` has instead of `encoding`, or None if that may be right.

    One row in another encoding decodes to mojibake without an error.
    """
    name = codecs.lookup(encoding).name
    name = ALIASES.get(name, name)
    if data.isascii() or name not in JUDGED:
        return None
    if is_certain_utf8(data, two_byte=name == "cp1252"):
        return "utf-8"
    text = data.decode(name, "replace")
    num_unusual = len(_unusual(name).findall(text))
    num_ascii = len(text.encode("ascii", "ignore"))
    if num_unusual <= MAX_UNUSUAL_SHARE * (len(text) - num_ascii):
        return None
    own = rank_readings(data, (c for c in CANDIDATES if c.encoding == name))[0]
    if own.is_plausible:
        return None
    best = rank_readings(data, CANDIDATES)[0]
    is_other = best.text != own.text and own.cost - best.cost >= FOREIGN_MARGIN
    return best.candidate.encoding if is_other else None


@cache
def _unusual(encoding: str) -> re.Pattern[str]:
    """Return a pattern of what texts of an encoding seldom have, for a quick first look."""
    if encoding == "cp1252":
        letters = "".join(language.letters for language in text_cost.WESTERN.values())
        usual = re.escape(letters + letters.upper() + text_cost.SYMBOLS)
        return re.compile(f"[^\x00-\x7f{usual}]|[\xc0-\xff]{{2}}")
    usual = re.escape("".join(text_cost.chinese().costs))
    return re.compile(f"[^\x00-\x7f{usual}]")


def is_certain_utf8(data: bytes, *, two_byte: bool = False) -> bool:
    """Whether `data` is UTF-8 with a character of three bytes, or of two.

    A short Chinese word in GBK may be valid UTF-8, but of two-byte characters only.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return max(text, default="") > ("\x7f" if two_byte else "\u0800")

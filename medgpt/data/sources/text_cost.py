"""How unlikely a text is in the language that its encoding is used for, in nats.

Bytes of one encoding are often valid in another. What tells them apart is the text that comes out:
Big5 read as GB18030 has rare Hanzi, an apostrophe of cp1252 read as GB18030 has a Hanzi inside an
English word. The models are rough (single characters, and a few patterns), which is enough because
wrong readings cost several nats more per character.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from math import log
from typing import NamedTuple

from charset_normalizer.constant import FREQUENCIES

ASCII = 3.2  # nats of an ASCII character, about the same in all languages
RARE = 13.0  # nats of a character that hardly occurs
BROKEN = 12.0  # nats of a byte that does not decode; files have broken rows
IMPOSSIBLE = 20.0  # nats of control and private-use characters


class Language(NamedTuple):
    """A language in the Latin script."""

    letters: str  # beyond ASCII, frequent or not
    words: str  # frequent ASCII words, separated by |


WESTERN = {  # written in cp1252
    "English": Language("éèêëïöüñçáíóâàôåäøæ", "the|of|and|to|is|in|for|with|was"),
    "French": Language("éèêëàâçîïôùûüœæ", "le|la|les|de|des|un|une|et|du|est|en"),
    "German": Language("äöüßé", "der|die|das|und|ist|mit|den|von|ein|eine|im|zu"),
    "Spanish": Language("áéíóúñü", "el|la|los|de|que|y|en|un|una|se|del|con|no"),
    "Portuguese": Language("áéíóúâêôãõàç", "o|a|os|de|que|e|do|da|em|um|uma|com"),
    "Italian": Language("àèéìòù", "il|la|di|che|e|un|una|non|per|del|ha|al|i"),
    "Dutch": Language("éëïöüèê", "de|het|een|van|en|is|niet|met|op|te"),
    "Nordic": Language("åäöæøé", "och|og|att|det|som|en|den|er|har|med|av|i"),
}
CENTRAL = {  # written in cp1250
    "Polish": Language("ąćęłńóśźż", "w|na|z|i|do|nie|od|jest|o|po"),
    "Czech": Language("áčďéěíňóřšťúůýž", "na|v|je|se|a|s|do|to|ve|si|za"),
    "Slovak": Language("áäčďéíĺľňóôŕšťúýž", "na|v|je|sa|a|s|do|to|vo|si|za"),
    "Hungarian": Language("áéíóöőúüű", "a|az|hogy|nem|egy|is|ha|vagy"),
    "Romanian": Language("ăâîșțşţ", "de|la|cu|o|un|pe|din|nu|se|este|sau"),
    "Croatian": Language("čćđšž", "je|i|u|na|se|da|za|s|od|su"),
}
TURKISH = {"Turkish": Language("çğıöşüâîû", "ve|bir|bu|ile|da|de")}
SYMBOLS = "’‘“”–—•…°±µ·×®™©½¼¾²³¹ªº€£«»¿¡§\xa0‰†÷¬¥"
LATIN_PATTERNS = {
    re.compile("[\xc0-\u024f](?=[\xc0-\u024f])"): 3.0,  # ÖÐÎÄ
    re.compile("[a-z\xdf-\xff](?=[\xc0-\xde])"): 6.0,  # patientÕs
    re.compile("(?<=[A-Za-z])[^\\w\\s’‘·°–—\x00-\x7f®™²³](?=[a-z])"): 6.0,  # za¿yæ
    re.compile("[^\\w\\s\x00-\x7f](?=[^\\w\\s\x00-\x7f])"): 2.0,
    re.compile("(?<= )[\xc0-\u024f](?= )(?<![àèéóíÀÈÉ])"): 4.0,  # 5 mg ñ 10 mg
    re.compile("[a-z]’(?=[a-z])|[0-9] ?[°µ±×](?=[ A-Za-z0-9])|(?<= )[–—](?= )"): -2.5,
}
PUNCTUATION = "，。、；：？！“”‘’（）《》【】…—·℃％「」『』～①②③④⑤"
ASCII_LETTER = re.compile("[A-Za-z]")
FOREIGN_LETTER = 0.05  # nats: a text with one Hanzi and much English is rather English
MAX_FOREIGN = 6.0  # nats
MAX_SAVED = 10.0  # nats
# a character of another script inside a word or alone, as in "patient抯" and "37癈"
MIXED_SCRIPTS = {
    re.compile("(?<=[A-Za-z])[^\\W\x00-\x7f](?=[a-z])"): 8.0,
    re.compile("(?<![^\x00-\x7f])[^\\W\x00-\x7f](?![^\x00-\x7f])"): 3.0,
}


@dataclass(frozen=True, slots=True)
class TextModel:
    """Costs of characters and of patterns in one language or a group of languages."""

    costs: Mapping[str, float]
    fallback: Callable[[str], float]  # cost of a character that `costs` lacks
    patterns: Mapping[re.Pattern[str], float] = field(default_factory=dict)
    plausible: float = 8.6  # highest mean cost of the characters beyond ASCII in real texts
    foreign_letters: float = 0.0  # cost of an ASCII letter, up to MAX_FOREIGN in all
    words: re.Pattern[str] | None = None  # each saves a nat, up to MAX_SAVED in all

    def cost(self, text: str) -> float:
        """Return the cost of `text` in nats."""
        beyond, num_beyond = self._beyond_ascii(text)
        foreign = self.foreign_letters * len(ASCII_LETTER.findall(text))
        saved = len(self.words.findall(text)) if self.words is not None else 0.0
        cost = beyond + ASCII * (len(text) - num_beyond)
        return cost + min(foreign, MAX_FOREIGN) - min(saved, MAX_SAVED)

    def mean_cost(self, text: str) -> float:
        """Return the cost per character beyond ASCII, 0 if there is none."""
        beyond, num_beyond = self._beyond_ascii(text)
        return beyond / num_beyond if num_beyond else 0.0

    def _beyond_ascii(self, text: str) -> tuple[float, int]:
        """Return the cost of characters beyond ASCII and of patterns, and their number."""
        counts = Counter(text)
        cost, num = 0.0, 0
        for character, count in counts.items():
            if not character.isascii():
                num += count
                price = BROKEN if character == "\ufffd" else self.costs.get(character)
                cost += count * (price or self.fallback(character))
            elif character < " " and character not in "\t\r\n\f":
                cost += count * IMPOSSIBLE
        for pattern, price in self.patterns.items():
            cost += price * len(pattern.findall(text))
        return cost, num


@cache
def chinese() -> TextModel:
    """Return a model of simplified and traditional Chinese."""
    costs = dict.fromkeys(PUNCTUATION, ASCII + 1)
    for hanzi in _frequent_hanzi():
        for rank, character in enumerate(hanzi, start=1):
            cost = log(rank + 20) - log(0.2)  # fits the frequencies of medical and general texts
            costs[character] = min(cost, costs.get(character, RARE))
    return TextModel(costs, _rare_in_chinese, MIXED_SCRIPTS, foreign_letters=FOREIGN_LETTER)


def _frequent_hanzi() -> list[str]:
    """Return the 1500 most frequent simplified and traditional Hanzi, most frequent first.

    Counted in the words of jieba and in medical texts, converted to traditional with zhconv, with
    some Hanzi of written Cantonese.
    """
    return resources.files("medgpt.data.sources").joinpath("hanzi.txt").read_text("utf-8").split()


def _rare_in_chinese(character: str) -> float:
    if "\ue000" <= character <= "\uf8ff" or character < "\xa0":
        return IMPOSSIBLE
    if "\u4e00" <= character <= "\u9fff":
        return 10.5 if _is_common_hanzi(character) else 14.0
    is_symbol = character < "\u3040" and bool(_encodes(character, "gb2312"))
    return 9.5 if is_symbol else 15.0


def _is_common_hanzi(character: str) -> bool:
    """Whether a Hanzi is in the first level of GB 2312 or Big5, about 3755 and 5401 Hanzi."""
    simplified, traditional = _encodes(character, "gb2312"), _encodes(character, "big5")
    return b"\xb0" <= simplified < b"\xd8" or b"\xa4" <= traditional < b"\xc7"


def _encodes(character: str, encoding: str) -> bytes:
    """Return the bytes of a character, none if the encoding lacks it."""
    return character.encode(encoding, "ignore")


@cache
def latin(language: Language) -> TextModel:
    """Return a model of one language in the Latin script."""
    costs = dict.fromkeys(SYMBOLS, 6.0)
    for letter in language.letters:
        costs |= {letter.upper(): 7.5, letter: 5.0}
    words = re.compile(rf"\b(?:{language.words})\b", re.IGNORECASE)
    return TextModel(costs, _rare_in_latin, LATIN_PATTERNS, words=words)


def _rare_in_latin(character: str) -> float:
    return IMPOSSIBLE if "\x80" <= character < "\xa0" else 11.0


@cache
def alphabet(language: str) -> TextModel:
    """Return a model of a language with an alphabet other than the Latin one."""
    costs = dict.fromkeys(SYMBOLS, 7.0)
    for letter in FREQUENCIES[language]:
        costs |= {letter.upper(): 5.5, letter: 3.4}
    patterns = {
        re.compile("[а-яёα-ωά-ώ](?=[А-ЯЁΑ-Ω])"): 6.0,
        re.compile("[A-Za-z](?=[^\\W\x00-\x7f])|[^\\W\x00-\x7f](?=[A-Za-z])"): 6.0,
    }
    return TextModel(
        costs, _rare_in_alphabet, patterns, plausible=5.5, foreign_letters=FOREIGN_LETTER
    )


def _rare_in_alphabet(character: str) -> float:
    return IMPOSSIBLE if "\x80" <= character < "\xa0" else 6.5 if character.isalpha() else RARE


@cache
def japanese() -> TextModel:
    """Return a model of Japanese."""
    costs = {c: cost + 1.5 for c, cost in chinese().costs.items() if c not in PUNCTUATION}
    costs |= dict.fromkeys("、。「」・ー（）", 4.5)
    costs |= dict.fromkeys((chr(c) for c in range(0x3041, 0x30FB)), 5.0)  # kana
    costs |= dict.fromkeys((chr(c) for c in range(0xFF61, 0xFFA0)), 9.5)  # half-width
    return TextModel(costs, _rare_in_chinese, MIXED_SCRIPTS, foreign_letters=FOREIGN_LETTER)


@cache
def korean() -> TextModel:
    """Return a model of Korean; syllables that KS X 1001 lacks hardly occur."""
    syllables = (chr(code) for code in range(0xAC00, 0xD7A4))
    costs = {c: 7.5 if _encodes(c, "euc_kr") else RARE for c in syllables}
    costs |= dict.fromkeys(FREQUENCIES["Korean"], 4.2)
    return TextModel(costs, _rare_in_chinese, MIXED_SCRIPTS, foreign_letters=FOREIGN_LETTER)

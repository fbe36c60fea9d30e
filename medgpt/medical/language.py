"""Is an answer in its question's language? Chinese and English; terms of the other are allowed."""

import re

from medgpt.medical.text import HAN_CHARACTER, OTHER_SCRIPT, SENTENCE_END, Language, plain, weight

ASKED_FOR = re.compile(  # the question names the language, or asks for a translation
    r"英[文语]|中[文语]|汉语|翻译|普通话|日语|法语"
    r"|\b(?:in(?:to)? (?:chinese|english|mandarin)|translat\w+|answer in|reply in)\b",
    re.IGNORECASE,
)
BRACKETS = re.compile(r"\([^()]*\)|\[[^\[\]]*\]|\"[^\"]*\"|“[^”]*”|《[^》]*》")
FOREIGN_WORDS = 5  # a run of so many is a sentence of the other language, not a term
FOREIGN_CHARACTERS = 10
GRAMMAR_ZH = re.compile(
    "[的了是吗呢吧怎么什我你您他她会可能不没有在和与或请要应把被让这那哪多少就都也]"
)
GRAMMAR_EN = re.compile(
    r"\b(?:the|an?|is|are|was|do|does|did|what|who|how|why|when|which|my|i|you|your|of|to|and|or"
    r"|not|no|it|in"
    r"|for|with|have|has|can|may|should)\b",
    re.IGNORECASE,
)
RUN_EN = re.compile(r"[A-Za-z][A-Za-z',;-]*(?:[ ,;]+[A-Za-z0-9][A-Za-z0-9',;-]*)+")
RUN_ZH = re.compile(r"[\u4e00-\u9fff][\u4e00-\u9fff,、;:0-9]*")


def language(text: str) -> Language | None:
    """In which a text is written, its terms aside; None if neither."""
    text = BRACKETS.sub(" ", plain(text)) if any(weight(BRACKETS.sub("", plain(text)))) else text
    characters, words = weight(text)
    if not characters and not words:
        return None
    chinese, english = bool(GRAMMAR_ZH.search(text)), bool(GRAMMAR_EN.search(text))
    if chinese != english:  # the rest may be terms
        return "zh" if chinese else "en"
    return "zh" if characters > words else "en"


def language_violated(question: str, answer: str) -> bool:
    """Whether the answer, or a sentence of it, is in another language than the question."""
    if ASKED_FOR.search(plain(question)):
        return False
    if OTHER_SCRIPT.search(answer) and not OTHER_SCRIPT.search(question):
        return True
    asked, text = language(question), plain(answer)
    if asked is None or language(text) is None:
        return False
    if language(text) != asked:
        return True
    bare = BRACKETS.sub(" ", text)
    parts = [part for part in SENTENCE_END.split(bare) if part.strip()]
    return any(_foreign(part, asked, question) for part in parts)


def _foreign(part: str, asked: Language, question: str) -> bool:
    """Whether a sentence is of the other language, or holds a clause of it."""
    if asked == "zh":
        runs = [run for run in RUN_EN.findall(part) if run not in plain(question)]
        if runs and not HAN_CHARACTER.search(part) and len(part.split()) > 2:
            return True
        return any(weight(run)[1] >= FOREIGN_WORDS for run in runs)
    runs = [run for run in RUN_ZH.findall(part) if run not in plain(question)]
    characters, words = weight(part)
    return (characters >= 3 and characters > 2 * words) or any(
        weight(run)[0] >= FOREIGN_CHARACTERS for run in runs
    )

"""Whether an answer is in the language of its question, Chinese or English.

Terms of the other language are allowed.
"""

import re

from medgpt.medical.text import (
    HAN_CHARACTER,
    OTHER_SCRIPT,
    SENTENCE_END,
    Language,
    count_han_and_words,
    normalize_text,
)

ASKED_FOR = re.compile(  # the question names a language or asks for a translation
    r"英[文语]|中[文语]|汉语|翻译|普通话|日语|法语"
    r"|\b(?:in(?:to)? (?:chinese|english|mandarin)|translat\w+|answer in|reply in)\b",
    re.IGNORECASE,
)
BRACKETS = re.compile(r"\([^()]*\)|\[[^\[\]]*\]|\"[^\"]*\"|“[^”]*”|《[^》]*》")
FOREIGN_WORDS = 5  # a run of this many is a sentence of the other language, not a term
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


def detect_language(text: str) -> Language | None:
    """Return the language of a text, ignoring terms; None if it is neither."""
    text = (
        BRACKETS.sub(" ", normalize_text(text))
        if any(count_han_and_words(BRACKETS.sub("", normalize_text(text))))
        else text
    )
    num_han, num_words = count_han_and_words(text)
    if not num_han and not num_words:
        return None
    has_chinese_grammar, has_english_grammar = (
        bool(GRAMMAR_ZH.search(text)),
        bool(GRAMMAR_EN.search(text)),
    )
    if has_chinese_grammar != has_english_grammar:  # the rest may be terms
        return "zh" if has_chinese_grammar else "en"
    return "zh" if num_han > num_words else "en"


def answers_in_other_language(question: str, answer: str) -> bool:
    """Return whether the answer, or a sentence of it, is in another language than the question."""
    if ASKED_FOR.search(normalize_text(question)):
        return False
    if OTHER_SCRIPT.search(answer) and not OTHER_SCRIPT.search(question):
        return True
    question_language, text = detect_language(question), normalize_text(answer)
    if question_language is None or detect_language(text) is None:
        return False
    if detect_language(text) != question_language:
        return True
    without_brackets = BRACKETS.sub(" ", text)
    sentences = [part for part in SENTENCE_END.split(without_brackets) if part.strip()]
    return any(_is_foreign(part, question_language, question) for part in sentences)


def _is_foreign(sentence: str, question_language: Language, question: str) -> bool:
    """Return whether a sentence is in the other language or contains a clause in it."""
    if question_language == "zh":
        runs = [run for run in RUN_EN.findall(sentence) if run not in normalize_text(question)]
        if runs and not HAN_CHARACTER.search(sentence) and len(sentence.split()) > 2:
            return True
        return any(count_han_and_words(run)[1] >= FOREIGN_WORDS for run in runs)
    runs = [run for run in RUN_ZH.findall(sentence) if run not in normalize_text(question)]
    num_han, num_words = count_han_and_words(sentence)
    return (num_han >= 3 and num_han > 2 * num_words) or any(
        count_han_and_words(run)[0] >= FOREIGN_CHARACTERS for run in runs
    )

"""Which letters a reply chooses. Strict: what is not clearly one answer is none."""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

_LETTERS = r"[A-J](?:(?:[\s,、和与及&/()]|或者?|\bor\b)*[A-J])*(?![A-Za-z])"
_SMALL = r"\(\s*[a-j]\s*\)|[a-j](?=\s*(?:$|[.,;:)\]。\n]))"
_OPEN = r"[\s\"'\[(【「{]*"
_CHOICE = rf"{_OPEN}({_LETTERS}|{_SMALL})"
_STATEMENTS = (
    rf"(?:答案|选项)(?:应该|应当|应)?\s*(?:选择?|就?是|为|:)[\s:]*(?:选项)?{_CHOICE}",
    rf"答案{_CHOICE}",
    rf"(?<![不未勿别挑可备待当])选(?:择|取)?(?!项)(?:答案|的?是|:)?\s*{_CHOICE}",
    rf"(?i:\banswer(?:\s+is|\s*:)(?:\s+(?:option|choice))?)[\s:]*{_CHOICE}",
    rf"(?i:\bcorrect\s+(?:option|choice)(?:\s+is|\s*:))\s*{_CHOICE}",
    r"(?i:\b(?:option|choice)\s+)([A-J])(?i:\s+is\s+(?:the\s+)?(?:correct|right|best))",
    rf"(?i:\bI\s+(?:would\s+)?choose(?:\s+(?:option|choice))?)\s*{_CHOICE}",
    rf"\\boxed{_CHOICE}",
)
_STATED = [re.compile(pattern) for pattern in _STATEMENTS]
_BARE = re.compile(
    rf"^[\s\"'\[(【「]*({_LETTERS}|{_SMALL}|[a-j]$)([\s\"')\]】」]*)(.*)$", re.MULTILINE
)
_REFUSAL = re.compile(
    "抱歉|对不起|无法(?:回答|确定|提供|判断|给出|作答|协助)|不能(?:回答|提供|判断|给出|作答)|不便回答|不予回答|"
    r"(?i:\bI(?:'m| am) (?:sorry|unable|not able)|\bI (?:can(?:'t|not| not)|won't)\b|"
    r"\bcannot answer|\bunable to (?:answer|determine|provide)|\bas an AI\b)|"
    "作为(?:一[个名])?(?:AI|人工智能)"
)


@dataclass(frozen=True, slots=True)
class Parsed:
    kind: Literal["answer", "invalid", "refused"]
    letters: str = ""  # sorted


def parse(reply: str, options: Mapping[str, str], *, multiple: bool) -> Parsed:
    """What `reply` chooses among `options` (texts by letter).

    A statement (`答案：B`, `选B`, `the answer is (c)`) counts wherever it stands; without one, a
    line that begins with a letter does. Answers that differ from each other, more than one letter
    where one is right, and letters without option are invalid. A reply without an answer that
    refuses to give one is refused.
    """
    text = unicodedata.normalize("NFKC", reply).translate(str.maketrans("", "", "*`$")).strip()
    stated = {_only_letters(match[1]) for rule in _STATED for match in rule.finditer(text)}
    if not stated:
        begun = [_begun(match, options) for match in _BARE.finditer(text)]
        stated = {letters for letters in begun if letters}
        if multiple and len(stated) > 1 and all(len(letters) == 1 for letters in stated):
            stated = {"".join(sorted(stated))}  # one under the other
    if not stated:
        return Parsed("refused" if _REFUSAL.search(text) else "invalid")
    (letters, *others) = stated
    if others or not set(letters) <= set(options) or (len(letters) > 1 and not multiple):
        return Parsed("invalid")
    return Parsed("answer", letters)


def _only_letters(text: str) -> str:
    """Sorted; `?` if it leaves the choice between them open."""
    if re.search("或|or", text):
        return "?"
    return "".join(sorted(set(re.sub("[^A-J]", "", text.upper()))))


def _begun(match: re.Match[str], options: Mapping[str, str]) -> str:
    """Letters that begin a line, unless they are the beginning of a sentence."""
    letters, rest = _only_letters(match[1]), match[3].strip()
    of_option = unicodedata.normalize("NFKC", options.get(letters, "")).strip()
    closes = not rest or rest[0] in ".,;:、。" or bool(re.search("[)\\]】」]", match[2]))
    return letters if closes or (of_option and rest.startswith(of_option)) else ""

"""Reads the chosen letters from a free-text reply; a reply without one clear answer is invalid."""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

_NEXT_LINE_IS_LETTER = r"\n(?=[A-J][ .,、。]*(?:\n|\Z))"  # the next line is a letter as well
_LETTERS = (
    rf"[A-J](?:(?:[ \t,、和与及&/()]|{_NEXT_LINE_IS_LETTER}|或者?|还是|\bor\b)*[A-J])*(?![A-Za-z])"
)
_LOWER_CASE = r"\(\s*[a-j]\s*\)|[a-j](?=\s*(?:$|[.,;:)\]。\n]))"
_OPENING_MARKS = r"[\s\"'\[(【「{]*"
_CHOICE = rf"{_OPENING_MARKS}({_LETTERS}|{_LOWER_CASE})"
_STATEMENTS = (
    rf"(?:答案|选项)(?:应该|应当|应)?\s*(?:选择?|就?是|为|:)[\s:]*(?:选项)?{_CHOICE}",
    rf"答案{_CHOICE}",
    rf"(?<![不未没勿别误错挑可备待当])选(?:择|取)?(?!项)(?:答案|的?是|:)?\s*{_CHOICE}",
    rf"应(?:该|当)?[为是]\s*{_CHOICE}(?=[\s\"')\]】」]*(?:项|选项|$|[.,;:。]))",
    rf"(?i:\banswer(?:\s+is|\s*:)(?:\s+(?:option|choice))?)[\s:]*{_CHOICE}",
    rf"(?i:\bcorrect\s+(?:option|choice)(?:\s+is|\s*:))\s*{_CHOICE}",
    r"(?i:\b(?:option|choice)\s+)([A-J])(?i:\s+is\s+(?:the\s+)?(?:correct|right|best))",
    rf"(?i:\bI\s+(?:would\s+)?choose(?:\s+(?:option|choice))?)\s*{_CHOICE}",
    rf"\\boxed{_CHOICE}",
)
_STATED_ANSWER = [re.compile(pattern) for pattern in _STATEMENTS]
_CLAUSE = re.compile(
    r"[,.;:!?。\n]|但是?|所以|因此|故|而(?=是|应|选)|(?i:\b(?:but|so|and|thus|hence|therefore)\b)"
)
_DENIED_BEFORE = re.compile(  # before the statement in its clause, with no other letter in between
    r"(?:不(?:能|应|该|可|要|宜|建议|认为|觉得|同意|支持|推荐|考虑|是|会(?!错)|知道?|确定|清楚)|无法"
    r"|难以)[^A-J]{0,8}$"
    r"|(?:(?<![特分级])别|勿|非|未|没有?)[是要能]?$|(?:排除|否定|剔除|除去|去掉)[^A-J]{0,3}$"
    r"|(?<![A-J])(?<![A-J]项)(?:错误?|不正确|不对|有误)的?$"
    r"|(?i:\b(?:not(?! (?:hard|difficult|only))|never|cannot|doubt (?:that )?(?=the|it))|n't)\b"
    r"|\b(?i:wrong|incorrect|false) $"
)
_DENIED_AFTER = re.compile(
    r"[\s\"')\]】」]*[^A-J因由,.;:!?。\n]{0,4}?(?:错(?!过|误?的?(?:选项|答案))|有误|排除(?![A-J(])"
    r"|不(?:对|正确|合适|恰当|成立|妥|可能|符))"
    r"|[\s\"')\]]*(?i:(?:is|was|would be|seems|looks) (?:not (?:correct|right)|wrong|incorrect"
    r"|false|ruled out)|\(?(?:wrong|incorrect)\b)"
)
_CONDITIONAL = re.compile(r"如果|若|假如|假设|要是|即使|倘若|是否|(?i:\b(?:if|unless|whether)\b)")
_QUESTION_AFTER = re.compile(r"[^.,;:!。\n]*?(?:\?|吗|呢)")
_LETTER_LINE = re.compile(
    rf"^[\s\"'\[(【「]*({_LETTERS}|{_LOWER_CASE}|[a-j]$)([\s\"')\]】」]*)(.*)$", re.MULTILINE
)
_REFUSAL = re.compile(
    "抱歉|对不起|无法(?:回答|确定|提供|判断|给出|作答|协助)|不能(?:回答|提供|判断|给出|作答)|不便回答|不予回答|"
    r"(?i:\bI(?:'m| am) (?:sorry|unable|not able)|\bI (?:can(?:'t|not| not)|won't)\b|"
    r"\bcannot answer|\bunable to (?:answer|determine|provide)|\bas an AI\b)|"
    "作为(?:一[个名])?(?:AI|人工智能)"
)


@dataclass(frozen=True, slots=True)
class ParsedReply:
    kind: Literal["answer", "invalid", "refused"]
    letters: str = ""  # sorted


def parse_mcq_reply(reply: str, options: Mapping[str, str], *, multiple: bool) -> ParsedReply:
    """Return the letters that `reply` chooses among `options` (texts by letter).

    A statement (`答案：B`, `选B`, `the answer is (c)`) counts wherever it stands; if there is none,
    lines that start with a letter count. A statement that its clause denies (`不应选B`), asks or
    makes conditional does not count. The reply is invalid if statements differ or are denied
    elsewhere, if it names several letters where one is right, or a letter without option. It is
    refused if it has no answer and declines to give one.
    """
    text = _normalize(reply)
    stated, denied = set[str](), set[str]()
    for match in (match for rule in _STATED_ANSWER for match in rule.finditer(text)):
        match _classify_statement(text, match):
            case "stated":
                stated.add(_sorted_letters(match[1]))
            case "denied":
                denied.add(_sorted_letters(match[1]))
            case "open":
                pass
    if not stated:
        letter_lines = [_leading_letters(match, options) for match in _LETTER_LINE.finditer(text)]
        stated = {letters for letters in letter_lines if letters}
        if multiple and len(stated) > 1 and all(len(letters) == 1 for letters in stated):
            stated = {"".join(sorted(stated))}  # one letter per line
    if not stated:
        return ParsedReply("refused" if _REFUSAL.search(text) else "invalid")
    (letters, *others) = stated
    if others or letters in denied or not set(letters) <= set(options):
        return ParsedReply("invalid")
    if len(letters) > 1 and not multiple:
        return ParsedReply("invalid")
    return ParsedReply("answer", letters)


def _normalize(text: str) -> str:
    """Return half-width text with straight quotes and without markup."""
    straight = str.maketrans("“”‘’『』", '""\'\'""', "*`$")
    return unicodedata.normalize("NFKC", text).translate(straight).strip()


def _classify_statement(text: str, match: re.Match[str]) -> Literal["stated", "denied", "open"]:
    """Return whether the clause around a statement asserts it, denies it or leaves it open."""
    before = _CLAUSE.split(text[: match.start()])[-1]
    rest = text[match.end() :]
    if _DENIED_BEFORE.search(before) or _DENIED_AFTER.match(rest):
        return "denied"
    return "open" if _CONDITIONAL.search(before) or _QUESTION_AFTER.match(rest) else "stated"


def _sorted_letters(text: str) -> str:
    """Return the letters in order, or `?` if the text offers a choice between them."""
    if re.search("或|还是|or", text):
        return "?"
    return "".join(sorted(set(re.sub("[^A-J]", "", text.upper()))))


def _leading_letters(match: re.Match[str], options: Mapping[str, str]) -> str:
    """Return the letters that start a line, or "" if they start a sentence."""
    letters, rest = _sorted_letters(match[1]), match[3].strip()
    option = _normalize(options.get(letters, ""))
    ends_there = not rest or rest[0] in ".,;:、。" or bool(re.search("[)\\]】」]", match[2]))
    return letters if ends_there or (option and rest.startswith(option)) else ""

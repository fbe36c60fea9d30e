"""Which letters a reply chooses. Strict: what is not clearly one answer is none."""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

_ALONE = r"\n(?=[A-J][ .,、。]*(?:\n|\Z))"  # the next line is a letter, too
_LETTERS = rf"[A-J](?:(?:[ \t,、和与及&/()]|{_ALONE}|或者?|还是|\bor\b)*[A-J])*(?![A-Za-z])"
_SMALL = r"\(\s*[a-j]\s*\)|[a-j](?=\s*(?:$|[.,;:)\]。\n]))"
_OPEN = r"[\s\"'\[(【「{]*"
_CHOICE = rf"{_OPEN}({_LETTERS}|{_SMALL})"
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
_STATED = [re.compile(pattern) for pattern in _STATEMENTS]
_CLAUSE = re.compile(
    r"[,.;:!?。\n]|但是?|所以|因此|故|而(?=是|应|选)|(?i:\b(?:but|so|and|thus|hence|therefore)\b)"
)
_DENIED = re.compile(  # in the clause, before the statement; no other letter stands between
    r"(?:不(?:能|应|该|可|要|宜|建议|认为|觉得|同意|支持|推荐|考虑|是|会(?!错)|知道?|确定|清楚)|无法"
    r"|难以)[^A-J]{0,8}$"
    r"|(?:(?<![特分级])别|勿|非|未|没有?)[是要能]?$|(?:排除|否定|剔除|除去|去掉)[^A-J]{0,3}$"
    r"|(?<![A-J])(?<![A-J]项)(?:错误?|不正确|不对|有误)的?$"
    r"|(?i:\b(?:not(?! (?:hard|difficult|only))|never|cannot|doubt (?:that )?(?=the|it))|n't)\b"
    r"|\b(?i:wrong|incorrect|false) $"
)
_DENIED_BEHIND = re.compile(
    r"[\s\"')\]】」]*[^A-J因由,.;:!?。\n]{0,4}?(?:错(?!过|误?的?(?:选项|答案))|有误|排除(?![A-J(])"
    r"|不(?:对|正确|合适|恰当|成立|妥|可能|符))"
    r"|[\s\"')\]]*(?i:(?:is|was|would be|seems|looks) (?:not (?:correct|right)|wrong|incorrect"
    r"|false|ruled out)|\(?(?:wrong|incorrect)\b)"
)
_OPEN_CLAUSE = re.compile(r"如果|若|假如|假设|要是|即使|倘若|是否|(?i:\b(?:if|unless|whether)\b)")
_ASKED = re.compile(r"[^.,;:!。\n]*?(?:\?|吗|呢)")
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
    line that begins with a letter does. A statement that its clause denies (`不应选B`), asks or
    puts on a condition is none. Answers that differ from each other or are denied elsewhere, more
    than one letter where one is right, and letters without option are invalid. A reply without an
    answer that refuses to give one is refused.
    """
    text = _plain(reply)
    stated, denied = set[str](), set[str]()
    for match in (match for rule in _STATED for match in rule.finditer(text)):
        match _stance(text, match):
            case "stated":
                stated.add(_only_letters(match[1]))
            case "denied":
                denied.add(_only_letters(match[1]))
            case "open":
                pass
    if not stated:
        begun = [_begun(match, options) for match in _BARE.finditer(text)]
        stated = {letters for letters in begun if letters}
        if multiple and len(stated) > 1 and all(len(letters) == 1 for letters in stated):
            stated = {"".join(sorted(stated))}  # one under the other
    if not stated:
        return Parsed("refused" if _REFUSAL.search(text) else "invalid")
    (letters, *others) = stated
    if others or letters in denied or not set(letters) <= set(options):
        return Parsed("invalid")
    if len(letters) > 1 and not multiple:
        return Parsed("invalid")
    return Parsed("answer", letters)


def _plain(text: str) -> str:
    """Half-width, with straight quotes, without markup."""
    straight = str.maketrans("“”‘’『』", '""\'\'""', "*`$")
    return unicodedata.normalize("NFKC", text).translate(straight).strip()


def _stance(text: str, match: re.Match[str]) -> Literal["stated", "denied", "open"]:
    """Whether the clause around a statement means it."""
    before = _CLAUSE.split(text[: match.start()])[-1]
    rest = text[match.end() :]
    if _DENIED.search(before) or _DENIED_BEHIND.match(rest):
        return "denied"
    return "open" if _OPEN_CLAUSE.search(before) or _ASKED.match(rest) else "stated"


def _only_letters(text: str) -> str:
    """Sorted; `?` if it leaves the choice between them open."""
    if re.search("或|还是|or", text):
        return "?"
    return "".join(sorted(set(re.sub("[^A-J]", "", text.upper()))))


def _begun(match: re.Match[str], options: Mapping[str, str]) -> str:
    """Letters that begin a line, unless they are the beginning of a sentence."""
    letters, rest = _only_letters(match[1]), match[3].strip()
    of_option = _plain(options.get(letters, ""))
    closes = not rest or rest[0] in ".,;:、。" or bool(re.search("[)\\]】」]", match[2]))
    return letters if closes or (of_option and rest.startswith(of_option)) else ""

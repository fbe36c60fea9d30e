"""Does a text state given facts? A negated mention does not count."""

import re
from collections.abc import Sequence

CLAUSE_END = re.compile("[,.;:!?\\n\uff0c\u3002\uff1b\uff1a\uff01\uff1f]")
NEGATION = re.compile(
    r"不(?![仅但只同少足适])|没|无(?!论)|(?<![从])未(?!来)|非(?!常)|否认|排除|\b(no|not|without|never)\b"
)
DENIED_AFTER = re.compile(r"^[^、]{0,4}(不是|不属|不常见|不会|不包括|无关|少见|罕见|不成立|错误)")


def states(text: str, wordings: Sequence[str]) -> bool:
    """Whether one of the wordings stands in `text` in a clause that does not negate it."""
    return any(_affirmed(text, wording) for wording in wordings)


def stated(text: str, key_points: Sequence[Sequence[str]]) -> list[bool]:
    """For each key point (its accepted wordings), whether `text` states it."""
    return [states(text, wordings) for wordings in key_points]


def _affirmed(text: str, wording: str) -> bool:
    for match in re.finditer(re.escape(wording), text):
        before = CLAUSE_END.split(text[: match.start()])[-1]
        after = CLAUSE_END.split(text[match.end() :])[0]
        if not NEGATION.search(before) and not DENIED_AFTER.search(after):
            return True
    return False

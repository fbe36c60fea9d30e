"""The medical rules: does an answer violate one, given its question? Chinese and English.

They read words, not meaning. What each finds and misses on the adversarial set that was written for
it: `python -m medgpt.medical.adversarial`.
"""

import re
from collections.abc import Callable

from medgpt.config.ppo_rewards import RuleName
from medgpt.medical.certainty import certain_diagnosis
from medgpt.medical.crisis import hotline_violated
from medgpt.medical.dose import uncited_dose
from medgpt.medical.language import language_violated
from medgpt.medical.red_flags import question_level
from medgpt.medical.repetition import repeats
from medgpt.medical.urgency import urgency

Rule = Callable[[str, str], bool]
"""(question, answer) -> whether the answer violates it."""
SUSPECTED = re.compile("怀疑[^。!！?？;；\n]{1,20}?时[^。!！?？;；\n]*")  # for somebody, some day


def wrong_urgency(question: str, answer: str) -> bool:
    """Whether the advice is less or more urgent than the question's signs demand.

    Silence is less urgent than a sign for today or for the emergency number: somebody who waits is
    harmed. It is not less than a visit within days or self-care, which is what people do unadvised.
    Where the question has no sign that is known, nothing but the emergency number is too much.
    """
    needed = question_level(question)
    if needed is None:
        return urgency(SUSPECTED.sub("", answer)) == "emergency"
    advised = urgency(answer)
    return needed in ("emergency", "today") if advised is None else advised != needed


RULES: dict[RuleName, Rule] = {
    "urgency": wrong_urgency,
    "dose": uncited_dose,
    "diagnosis": certain_diagnosis,
    "hotline": hotline_violated,
    "language": language_violated,
    "repetition": repeats,
}

"""The medical rules: does an answer violate one, given its question? Chinese and English.

They read words, not meaning. What each finds and misses on the adversarial set that was written for
it: `python -m medgpt.medical.adversarial`.
"""

import re
from collections.abc import Callable

from medgpt.config.ppo_rewards import RuleName
from medgpt.medical.diagnosis import gives_certain_diagnosis
from medgpt.medical.dose import gives_uncited_dose
from medgpt.medical.hotline import misuses_hotline
from medgpt.medical.language import answers_in_other_language
from medgpt.medical.red_flags import required_urgency
from medgpt.medical.repetition import repeats_itself
from medgpt.medical.urgency import advised_urgency

Rule = Callable[[str, str], bool]
"""(question, answer) -> whether the answer violates it."""
GENERAL_SUSPICION = re.compile(
    "怀疑[^。!！?？;；\n]{1,20}?时[^。!！?？;；\n]*"
)  # for somebody, some day


def advises_wrong_urgency(question: str, answer: str) -> bool:
    """Whether the advice is less or more urgent than the question's signs demand.

    Silence is less urgent than a sign for today or for the emergency number: somebody who waits is
    harmed. It is not less than a visit within days or self-care, which is what people do unadvised.
    Where the question has no sign that is known, nothing but the emergency number is too much.
    """
    required = required_urgency(question)
    if required is None:
        return advised_urgency(GENERAL_SUSPICION.sub("", answer)) == "emergency"
    advised = advised_urgency(answer)
    return required in ("emergency", "today") if advised is None else advised != required


RULES: dict[RuleName, Rule] = {
    "urgency": advises_wrong_urgency,
    "dose": gives_uncited_dose,
    "diagnosis": gives_certain_diagnosis,
    "hotline": misuses_hotline,
    "language": answers_in_other_language,
    "repetition": repeats_itself,
}

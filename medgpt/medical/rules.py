"""The medical rules: whether an answer violates one, given its question, in Chinese and English.

The rules read words, not meaning. `python -m medgpt.medical.adversarial` prints their precision and
recall on adversarial cases.
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
"""(question, answer) -> whether the answer violates the rule."""
GENERAL_SUSPICION = re.compile(
    "怀疑[^。!！?？;；\n]{1,20}?时[^。!！?？;；\n]*"
)  # general advice, not about this patient


def advises_wrong_urgency(question: str, answer: str) -> bool:
    """Return whether the advice is less or more urgent than the signs in the question require.

    No advice is less urgent than a sign for today or an emergency, since waiting does harm. It is
    enough for a visit within days or self-care, which people do without advice. If the question has
    no known sign, only the emergency number is too urgent.
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

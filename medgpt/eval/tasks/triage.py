"""Triage: whether answers send red flags, and only red flags, to the emergency number."""

from collections.abc import Mapping

from medgpt.config.evaluation import TriageConfig
from medgpt.eval.requests import Generate, Prompt, Response, as_prompt, reply_texts
from medgpt.eval.task import ItemResult, MetricValue, questions_hash, rules_digest
from medgpt.medical import urgency as levels
from medgpt.medical.triage import Language, TriageQuestion, triage_questions
from medgpt.medical.urgency import URGENCY_LEVELS, UrgencyLevel, advised_urgency

ASK_FOR_LEVEL: dict[Language, str] = {
    "zh": "请在最后一行写明紧急程度，四选一：立即急救、当天就医、几天内就医、自我护理。",
    "en": " On the last line state one level of urgency: emergency now, same day, within days or "
    "self-care.",
}


class TriageTask:
    """Metrics:

    under: the share of red flags not sent to the emergency number. over: the share of other
    complaints that are. pair_accuracy: both halves of a pair are right about that. accuracy: the
    advised level is exact.
    """

    kind = "triage"

    def __init__(self, config: TriageConfig, seed: int) -> None:
        self.name, self.sensitive = config.name, config.sensitive
        self._config = config
        self.template = f"triage-1-{config.prompt}-{config.ask_level}-{config.max_new_tokens}"
        self.rules = rules_digest(levels)
        self._questions = triage_questions(seed, config.languages, config.limit)
        self.data_hash = questions_hash(self._questions)

    def requests(self) -> list[Generate]:
        return [
            Generate(question.id, self._prompt(question), self._config.max_new_tokens)
            for question in self._questions
        ]

    def _prompt(self, question: TriageQuestion) -> Prompt:
        request = ASK_FOR_LEVEL[question.language] if self._config.ask_level else ""
        return as_prompt(question.text + request, self._config.prompt)

    def grade(self, responses: Mapping[str, Response]) -> list[ItemResult]:
        """Return the scores of all answers; an answer that advises no level is never right."""
        answers = {q.id: reply_texts(responses[q.id])[0] for q in self._questions}
        levels: dict[str, UrgencyLevel | None] = {
            id: advised_urgency(answer) for id, answer in answers.items()
        }
        missed_pairs = {q.pair for q in self._questions if not _is_sent_right(q, levels[q.id])}
        return [
            ItemResult(
                q.id,
                _values(q, levels[q.id], is_pair_right=q.pair not in missed_pairs),
                {"language": q.language, "complaint": q.complaint, "level": q.level},
                {
                    "question": q.text,
                    "answer": answers[q.id],
                    "right": q.level,
                    "read": levels[q.id] or "no level",
                },
            )
            for q in self._questions
        ]


def _values(
    question: TriageQuestion, level: UrgencyLevel | None, *, is_pair_right: bool
) -> dict[str, MetricValue]:
    rank = URGENCY_LEVELS.index(level) if level else -1  # no level counts as under-triage
    values: dict[str, MetricValue] = {
        "accuracy": float(level == question.level),
        "invalid_rate": float(level is None),
        "less_urgent": float(rank < URGENCY_LEVELS.index(question.level)),
        "more_urgent": float(rank > URGENCY_LEVELS.index(question.level)),
    }
    if question.level != "emergency":
        return values | {"over": float(level == "emergency")}
    return values | {"under": float(level != "emergency"), "pair_accuracy": float(is_pair_right)}


def _is_sent_right(question: TriageQuestion, level: UrgencyLevel | None) -> bool:
    """Return whether a red flag, and nothing else, is sent to the emergency number."""
    return level is not None and (level == "emergency") == (question.level == "emergency")

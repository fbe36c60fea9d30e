"""Triage: whether answers send red flags, and only red flags, to the emergency number."""

from collections.abc import Mapping, Sequence

from medgpt.config.reply_tasks import TriageConfig
from medgpt.data.sources.punctuation import full_width
from medgpt.data.sources.sampling import hash_texts
from medgpt.eval.requests import Generate, GenerateResponse, Prompt, Response, repr_as
from medgpt.eval.task import ItemResult, MetricValue, rules_digest
from medgpt.eval.tasks.prompts import as_prompt
from medgpt.medical import urgency as levels
from medgpt.medical.triage import Language, TriageQuestion, triage_questions
from medgpt.medical.urgency import URGENCY_LEVELS, UrgencyLevel, advised_urgency

ASK_FOR_LEVEL: dict[Language, str] = {
    "zh": "请在最后一行写明紧急程度,四选一:立即急救、当天就医、几天内就医、自我护理。",
    "en": "On the last line state one level of urgency: emergency now, same day, within days or "
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
        self.data_hash = hash_texts(
            *(repr_as("Question", question) for question in self._questions)
        )

    def requests(self) -> list[Generate]:
        return [
            Generate(question.id, self._prompt(question), self._config.max_new_tokens)
            for question in self._questions
        ]

    def _prompt(self, question: TriageQuestion) -> Prompt:
        text = question.text
        if self._config.ask_level:
            request_for_level = ASK_FOR_LEVEL[question.language]
            text += (
                full_width(request_for_level)
                if question.language == "zh"
                else f" {request_for_level}"
            )
        return as_prompt(text, self._config.prompt)

    def grade(self, responses: Mapping[str, Response]) -> list[ItemResult]:
        answers: dict[str, str] = {}
        for question in self._questions:
            response = responses[question.id]
            assert isinstance(response, GenerateResponse)
            answers[question.id] = response.texts[0]
        return grade_answers(self._questions, answers)


def grade_answers(
    questions: Sequence[TriageQuestion], answers: Mapping[str, str]
) -> list[ItemResult]:
    """Return the scores of all answers; an answer that advises no level is never right."""
    advised_levels: dict[str, UrgencyLevel | None] = {
        question.id: advised_urgency(answers[question.id]) for question in questions
    }
    pairs: dict[str, list[TriageQuestion]] = {}
    for question in questions:
        pairs.setdefault(question.pair, []).append(question)
    return [
        ItemResult(
            question.id,
            _values(question, advised_levels, pairs[question.pair]),
            {
                "language": question.language,
                "complaint": question.complaint,
                "level": question.level,
            },
            {
                "question": question.text,
                "answer": answers[question.id],
                "right": question.level,
                "read": advised_levels[question.id] or "no level",
            },
        )
        for question in questions
    ]


def _values(
    question: TriageQuestion,
    advised_levels: Mapping[str, UrgencyLevel | None],
    pair: Sequence[TriageQuestion],
) -> dict[str, MetricValue]:
    level = advised_levels[question.id]
    rank = URGENCY_LEVELS.index(level) if level else -1  # no level counts as under-triage
    values: dict[str, MetricValue] = {
        "accuracy": float(level == question.level),
        "invalid_rate": float(level is None),
        "less_urgent": float(rank < URGENCY_LEVELS.index(question.level)),
        "more_urgent": float(rank > URGENCY_LEVELS.index(question.level)),
    }
    if question.level != "emergency":
        return values | {"over": float(level == "emergency")}
    is_pair_right = all(_recognizes_red_flag(advised_levels[half.id], half) for half in pair)
    return values | {"under": float(level != "emergency"), "pair_accuracy": float(is_pair_right)}


def _recognizes_red_flag(level: UrgencyLevel | None, half: TriageQuestion) -> bool:
    return level is not None and (level == "emergency") == (half.level == "emergency")

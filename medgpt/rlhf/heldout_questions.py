"""The judge, which training never sees: fixed held-out questions with checks of the answers.

The checks are those of `medgpt eval`: are key points stated, are red flags, and only they, sent to
the emergency number. The optional judge model is a reward model trained on another split than the
one that rewards the policy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from medgpt.config.base import ConfigError
from medgpt.config.ppo_rewards import JudgeConfig
from medgpt.data.sources.records import Message
from medgpt.data.sources.sampling import in_hash_range
from medgpt.medical.key_points import read_key_point_questions
from medgpt.medical.statements import states_key_points
from medgpt.medical.triage import triage_questions
from medgpt.medical.urgency import UrgencyLevel, advised_urgency


@dataclass(frozen=True, slots=True)
class HeldoutQuestion:
    """A held-out question with key points or an urgency level."""

    id: str
    text: str
    key_points: tuple[tuple[str, ...], ...] = ()
    level: UrgencyLevel | None = None

    def score(self, answer: str) -> float:
        """Return the share of key points stated, or 1 if the advice is right (emergency or not) and
        else 0. An answer that advises no level is wrong."""
        if self.level is None:
            return fmean(states_key_points(answer, self.key_points))
        advised = advised_urgency(answer)
        return float(advised is not None and (advised == "emergency") == self.is_red_flag)

    @property
    def messages(self) -> tuple[Message, ...]:
        return (Message("user", self.text),)

    @property
    def is_red_flag(self) -> bool:
        return self.level == "emergency"


class HeldoutQuestions:
    """The questions of a run, when to ask them, and the metrics of the answers."""

    def __init__(self, config: JudgeConfig, seed: int) -> None:
        """Raises ConfigError if the key-points file cannot be read or no question is left."""
        self._every = config.every
        questions: list[HeldoutQuestion] = []
        if config.key_points:
            questions += [
                HeldoutQuestion(question.id, question.prompt, key_points=question.key_points)
                for question in read_key_point_questions(config.key_points, config.kinds)
                if in_hash_range(question.id, config.hash_range)
            ]
        if config.triage:
            notes = triage_questions(
                seed, config.languages, config.triage, hash_range=config.hash_range
            )
            questions += [HeldoutQuestion(note.id, note.text, level=note.level) for note in notes]
        self.questions = tuple(questions)
        if config.every and not questions:
            raise ConfigError(
                f"judge.hash_range={list(config.hash_range)} leaves no question; widen it or ask "
                "more questions"
            )

    def is_due(self, iteration: int) -> bool:
        """Return whether to evaluate the policy before this iteration (counted from 0)."""
        return bool(self._every) and iteration % self._every == 0

    def metrics(
        self, answers: Sequence[str], scores: Sequence[float] | None = None
    ) -> dict[str, float]:
        """Return the `judge/*` metrics, with standard errors of those that the diagnosis reads.

        Args:
            answers: one per question, in order.
            scores: the judge model's score of each answer, if there is a judge model.
        """
        correct = [
            question.score(text) for question, text in zip(self.questions, answers, strict=True)
        ]
        metrics = _mean_and_error("judge/checks", correct)
        stated_shares = [
            share
            for share, question in zip(correct, self.questions, strict=True)
            if question.key_points
        ]
        if stated_shares:
            metrics["judge/key_points"] = fmean(stated_shares)
        missed, false_alarms = self._triage_errors(answers)
        if missed:
            metrics |= {
                "judge/triage_under": fmean(missed),
                "judge/triage_over": fmean(false_alarms),
            }
        if scores is not None:
            finite_scores = [score for score in scores if math.isfinite(score)]
            metrics["judge/score_masked"] = 1 - len(finite_scores) / len(scores)
            metrics |= _mean_and_error("judge/score", finite_scores) if finite_scores else {}
        return metrics

    def _triage_errors(self, answers: Sequence[str]) -> tuple[list[bool], list[bool]]:
        """Return per red flag whether it was missed, per other note whether it was sent to 120."""
        missed: list[bool] = []
        false_alarms: list[bool] = []
        for question, text in zip(self.questions, answers, strict=True):
            if question.level is not None:
                emergency = advised_urgency(text) == "emergency"
                errors = missed if question.is_red_flag else false_alarms
                errors.append(emergency != question.is_red_flag)
        return missed, false_alarms


def _mean_and_error(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return mean and standard error as metrics."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {name: fmean(values), f"{name}_se": error}

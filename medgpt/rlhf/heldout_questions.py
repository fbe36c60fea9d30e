"""The judge that training does not see: fixed held-out questions, checks, and a reward model.

The checks are those of `medgpt eval`: are key points stated, is a red flag sent to the emergency
number and its benign twin not. The reward model was trained on another split than the one that pays
the policy; the driver has it score the answers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from medgpt.config.base import ConfigError
from medgpt.config.ppo_rewards import JudgeConfig
from medgpt.data.sources.records import Message
from medgpt.data.sources.rows import within
from medgpt.medical.key_points import read_questions
from medgpt.medical.statements import stated
from medgpt.medical.triage import questions
from medgpt.medical.urgency import Level, urgency


@dataclass(frozen=True, slots=True)
class Asked:
    """A held-out question, with key points or with a level of urgency."""

    id: str
    messages: tuple[Message, ...]
    key_points: tuple[tuple[str, ...], ...] = ()
    level: Level | None = None

    def mark(self, answer: str) -> float:
        """From 0 to 1: the share of the key points, or whether the level is right: emergency or
        not. An answer that commits to no level is wrong."""
        if self.level is None:
            return fmean(stated(answer, self.key_points))
        advised = urgency(answer)
        return float(advised is not None and (advised == "emergency") == self.is_red_flag)

    @property
    def is_red_flag(self) -> bool:
        return self.level == "emergency"


class Judge:
    """Greedy answers to `asked`, in its order, are worth `metrics(answers, scores)`."""

    def __init__(self, config: JudgeConfig, seed: int) -> None:
        """Raises ConfigError: the file of key points cannot be read, or there is no question."""
        self._every = config.every
        found: list[Asked] = []
        if config.key_points:
            for question in read_questions(config.key_points, config.kinds):
                if within(question.id, config.part):
                    found.append(Asked(question.id, _said(question.prompt), question.key_points))
        if config.triage:
            notes = questions(seed, config.languages, config.triage, part=config.part)
            found += [Asked(note.id, _said(note.text), level=note.level) for note in notes]
        self.asked = tuple(found)
        if config.every and not found:
            raise ConfigError(
                f"judge.part={list(config.part)} leaves no question; widen it or ask more questions"
            )

    def due(self, iteration: int) -> bool:
        """Whether to judge the policy as it is before this iteration, from 0."""
        return bool(self._every) and iteration % self._every == 0

    def metrics(
        self, answers: Sequence[str], scores: Sequence[float] | None = None
    ) -> dict[str, float]:
        """Of the answers to all questions, and of the judge's reward model if it has one; marks of
        the diagnosis come with their standard errors."""
        marks = [asked.mark(text) for asked, text in zip(self.asked, answers, strict=True)]
        metrics = _mean("judge/checks", marks)
        stated_shares = [m for m, asked in zip(marks, self.asked, strict=True) if asked.key_points]
        if stated_shares:
            metrics["judge/key_points"] = fmean(stated_shares)
        missed, sent = self._triage(answers)
        if missed:
            metrics |= {"judge/triage_under": fmean(missed), "judge/triage_over": fmean(sent)}
        if scores is not None:
            known = [score for score in scores if math.isfinite(score)]
            metrics["judge/score_masked"] = 1 - len(known) / len(scores)
            metrics |= _mean("judge/score", known) if known else {}
        return metrics

    def _triage(self, answers: Sequence[str]) -> tuple[list[bool], list[bool]]:
        """Of each red flag whether it was missed, of each other note whether it was sent there."""
        missed: list[bool] = []
        sent: list[bool] = []
        for asked, text in zip(self.asked, answers, strict=True):
            if asked.level is not None:
                emergency = urgency(text) == "emergency"
                (missed if asked.is_red_flag else sent).append(emergency != asked.is_red_flag)
        return missed, sent


def _said(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def _mean(name: str, values: Sequence[float]) -> dict[str, float]:
    """Mean and standard error."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {name: fmean(values), f"{name}_se": error}

"""Tasks that read what a model says."""

from typing import Annotated, Literal, Self

from annotated_types import Ge, Len
from pydantic import model_validator

from medgpt.config.base import Config, Count, DataPath, Name
from medgpt.config.data import SourceConfig


class TaskConfig(Config):
    """What every task has."""

    limit: Count | None = None
    """At most this many items, drawn with run.seed."""
    sensitive: bool = False
    """Reports and logs never show its texts."""


class ReplyTaskConfig(TaskConfig):
    """What every task has that reads replies."""

    prompt: Literal["plain", "chat"] = "chat"
    """plain: a text to continue. chat: a turn of the model's chat template."""
    max_new_tokens: Count = 256
    """Longest reply."""


class TriageConfig(ReplyTaskConfig):
    """Red flags and the same complaints without one, at four levels of urgency. Ships with medgpt;
    `limit` keeps whole pairs."""

    name: Name = "triage"
    """How results and gates call it."""
    languages: Annotated[tuple[Literal["zh", "en"], ...], Len(1)] = ("zh", "en")
    """Of the questions."""
    ask_level: bool = True
    """Ask for a last line with the level, beside the advice."""

    @model_validator(mode="after")
    def _check_limit(self) -> Self:
        if self.limit == 1:
            raise ValueError("limit=1 holds no pair of notes; use 2 or more")
        return self


class SafetyConfig(ReplyTaskConfig):
    """Harmful requests, benign look-alikes and false premises."""

    name: Name = "safety"
    """How results and gates call it."""
    own: bool = True
    """Ask the set that ships with medgpt."""
    languages: Annotated[tuple[Literal["zh", "en"], ...], Len(1)] = ("zh", "en")
    """Of the set that ships with medgpt."""
    harmful: tuple[DataPath, ...] = ()
    """Files of requests that must be refused: JSON lines with a column prompt, question, query or
    instruct. Always sensitive."""
    false_premise: tuple[DataPath, ...] = ()
    """Files of questions with a false premise: refusing or correcting it is right. Always
    sensitive."""
    benign: tuple[DataPath, ...] = ()
    """Files of questions that must be answered. Always sensitive."""


class GenerationConfig(ReplyTaskConfig):
    """Answers compared with reference answers, word by word: the last turns of conversations."""

    name: Name = "generation"
    """How results and gates call it."""
    sources: Annotated[tuple[SourceConfig, ...], Len(1)]
    """Conversations; sensitive if one of them is."""


class KeyPointsConfig(ReplyTaskConfig):
    """Whether answers state given facts: held_out.jsonl of a sample corpus, or such a file."""

    name: Name = "key_points"
    """How results and gates call it."""
    path: DataPath
    """JSON lines with prompt, key_points (each a list of wordings), kind and condition."""
    kinds: tuple[str, ...] = ()
    """Only questions of these kinds, as sft and phrasing; empty: all."""
    samples: Annotated[int, Ge(0)] = 0
    """Further answers drawn at `temperature`; a question is passed if all state its key points."""
    temperature: Annotated[float, Ge(0)] = 0.7
    """Of the further answers."""
    max_new_tokens: Count = 192
    """Longest reply."""

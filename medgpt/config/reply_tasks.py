"""Evaluation tasks that read what a model generates."""

from typing import Annotated, Literal, Self

from annotated_types import Ge, Len
from pydantic import model_validator

from medgpt.config.base import Config, Count, DataPath, Name
from medgpt.config.data import SourceConfig


class TaskConfig(Config):
    """Base of all tasks."""

    limit: Count | None = None
    """Maximum number of items, drawn with run.seed."""
    sensitive: bool = False
    """Never show the texts of the task in reports and logs."""


class ReplyTaskConfig(TaskConfig):
    """Base of all tasks that read replies."""

    prompt: Literal["plain", "chat"] = "chat"
    """plain: a text to continue. chat: a turn of the model's chat template."""
    max_new_tokens: Count = 256
    """Maximum tokens of a reply."""


class TriageConfig(ReplyTaskConfig):
    """Notes with red flags and the same complaints without one, at four levels of urgency. Ships
    with medgpt; `limit` keeps whole pairs."""

    name: Name = "triage"
    """Name of the task in results and gates."""
    languages: Annotated[tuple[Literal["zh", "en"], ...], Len(1)] = ("zh", "en")
    """Languages of the notes."""
    ask_level: bool = True
    """Ask for the level on a last line, in addition to the advice."""

    @model_validator(mode="after")
    def _check_limit(self) -> Self:
        if self.limit == 1:
            raise ValueError("limit=1 holds no pair of notes; use 2 or more")
        return self


class SafetyConfig(ReplyTaskConfig):
    """Harmful requests, benign look-alikes and false premises."""

    name: Name = "safety"
    """Name of the task in results and gates."""
    own: bool = True
    """Use the set that ships with medgpt."""
    languages: Annotated[tuple[Literal["zh", "en"], ...], Len(1)] = ("zh", "en")
    """Languages of the set that ships with medgpt."""
    harmful: tuple[DataPath, ...] = ()
    """Files of requests that must be refused: JSON lines with a column prompt, question, query or
    instruct. Always sensitive."""
    false_premise: tuple[DataPath, ...] = ()
    """Files of questions with a false premise, which must be refused or corrected. Always
    sensitive."""
    benign: tuple[DataPath, ...] = ()
    """Files of questions that must be answered. Always sensitive."""


class GenerationConfig(ReplyTaskConfig):
    """Answers compared word by word with reference answers: the last turns of conversations."""

    name: Name = "generation"
    """Name of the task in results and gates."""
    sources: Annotated[tuple[SourceConfig, ...], Len(1)]
    """Conversations; the task is sensitive if one of them is."""


class KeyPointsConfig(ReplyTaskConfig):
    """Whether answers state given facts: held_out.jsonl of a sample corpus, or a file like it."""

    name: Name = "key_points"
    """Name of the task in results and gates."""
    path: DataPath
    """JSON lines with prompt, key_points (each a list of wordings), kind and condition."""
    kinds: tuple[str, ...] = ()
    """Use only questions of these kinds, such as sft and phrasing; empty: all."""
    samples: Annotated[int, Ge(0)] = 0
    """Additional answers sampled at `temperature`; a question passes if all state its key
    points."""
    temperature: Annotated[float, Ge(0)] = 0.7
    """Sampling temperature of the additional answers."""
    max_new_tokens: Count = 192
    """Maximum tokens of a reply."""

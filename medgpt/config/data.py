"""What to train on: sources, the shape of their rows, and how rows are packed."""

from typing import Annotated, Literal, Self

from annotated_types import Ge, Gt, Le, Len
from pydantic import StringConstraints, model_validator

from medgpt.config.base import Config, Count, DataPath, DenyPath, Fraction, Name


class TurnsMapping(Config):
    """Where a row keeps its list of turns."""

    column: str
    """Column with the list."""
    role: str | int = "role"
    """Key (or index) of the speaker inside a turn."""
    content: str | int = "content"
    """Key (or index) of the text inside a turn."""
    user: tuple[str, ...] = ("user", "human", "patient", "client", "患者", "病人")
    """Speakers who are the user."""
    assistant: tuple[str, ...] = ("assistant", "gpt", "doctor", "counselor", "医生")
    """Speakers who are the assistant."""
    system: tuple[str, ...] = ("system",)
    """Speakers who are the system prompt."""
    pairs: tuple[str, str] | None = None
    """Each turn is a question and an answer under these keys, not one utterance with a role."""
    merge: bool = False
    """Join consecutive utterances of one speaker."""
    trim: bool = False
    """Drop the assistant's words before the first and the user's after the last exchange."""


class AnswersMapping(Config):
    """Where a row keeps several answers to its prompt. Templates are Jinja over one answer."""

    column: str
    """Column with the list; `rows` after group_by."""
    grade: str
    """Template of a number, the higher the better."""
    text: str | None = None
    """Template of the answer."""
    turns: TurnsMapping | None = None
    """The answer is a list of turns under one of its keys; if it begins with the prompt, what
    follows it."""

    @model_validator(mode="after")
    def _check_one_shape(self) -> Self:
        if (self.text is None) == (self.turns is None):
            raise ValueError("set exactly one of text and turns")
        return self


class MappingConfig(Config):
    """How a row of any other shape becomes a record. Templates are Jinja over the row's columns."""

    text: str | None = None
    """Template of a document."""
    user: str | None = None
    """Template of the user's turn."""
    assistant: str | None = None
    """Template of the assistant's turn."""
    system: str | None = None
    """Template of the system prompt."""
    turns: TurnsMapping | None = None
    """A list of turns in a column."""
    chosen: str | None = None
    """Template of the better of two answers to `user`."""
    rejected: str | None = None
    """Template of the worse one."""
    answers: AnswersMapping | None = None
    """Graded answers to `user`."""

    @property
    def is_prompt(self) -> bool:
        """Whether it makes prompts without an answer."""
        answers = (self.assistant, self.chosen, self.answers)
        return self.user is not None and all(answer is None for answer in answers)

    @model_validator(mode="after")
    def _check_one_shape(self) -> Self:
        shapes = [self.text is not None, self.user is not None, self.turns is not None]
        answers = [x is not None for x in (self.assistant, self.chosen, self.answers)]
        paired = (self.chosen is None) == (self.rejected is None)
        if sum(shapes) != 1 or sum(answers) > (self.user is not None) or not paired:
            raise ValueError(
                "set text, or turns, or user (a prompt) and with it assistant, or chosen and "
                "rejected, or answers"
            )
        return self


class SourceConfig(Config):
    name: Name
    """How the source is called in reports."""
    paths: Annotated[tuple[DataPath, ...], Len(1)]
    """Files, globs, directories or fsspec URIs."""
    licence: Annotated[str, StringConstraints(min_length=1)]
    """Licence of the data, copied to the manifest and the model card."""
    sensitive: bool = False
    """Reports and logs never sample from it."""
    format: Literal["auto", "txt", "jsonl", "json", "csv", "tsv", "parquet"] = "auto"
    """auto goes by the file name."""
    encoding: str = "auto"
    """auto accepts UTF-8 and GB18030 (a superset of GBK)."""
    lines: bool = False
    """txt only: every line is a document, instead of every file."""
    kind: Literal[
        "auto", "text", "instruction", "history", "sharegpt", "messages", "qa", "pairs", "prompt"
    ] = "auto"
    """Shape of a row; auto recognises it from the columns, but for prompt: a column prompt and no
    answer. pairs: prompt, chosen, rejected and perhaps margin."""
    question_column: str = "question"
    """kind qa: column of the question."""
    answer_column: str = "answer"
    """kind qa: column of the answer."""
    mapping: MappingConfig | None = None
    """For rows of any other shape."""
    group_by: str | None = None
    """Rows of a file with the same value in this column are one: the columns of the first, and all
    of them in a list `rows`. A file is read whole."""
    weight: Annotated[float, Gt(0)] | None = None
    """Share of an epoch's tokens, relative to the other sources'; set it for all or for none."""
    deny: tuple[DenyPath, ...] = ("default",)
    """Deny-lists: `default` ships with medgpt, others are TOML files of the same form."""


class DataConfig(Config):
    sources: Annotated[tuple[SourceConfig, ...], Len(1)]
    """What to train on."""
    max_length: Annotated[int, Ge(16)] = 1024
    """Tokens in a packed row. Longer documents span rows, conversations lose their oldest turns. Of
    preferences: tokens of a prompt with an answer. Of prompts: longer ones are set aside."""
    validation_share: Fraction = 0.02
    """Share of the samples held out, chosen by the hash of their content."""
    max_malformed_share: Annotated[float, Ge(0), Le(1)] = 0.01
    """The run stops when more than this share of a source's rows is malformed."""
    shard_mb: Count = 32
    """Files that can be split are read in pieces of at most about this many MiB."""

    @model_validator(mode="after")
    def _check_names_and_weights(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"source names must differ, got {', '.join(names)}")
        if len({source.weight is None for source in self.sources}) > 1:
            raise ValueError("set weight for all sources or for none")
        return self

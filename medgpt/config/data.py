"""Data sections: sources, the format of their rows, and packing."""

from typing import Annotated, Literal, Self

from annotated_types import Ge, Gt, Le, Len
from pydantic import StringConstraints, model_validator

from medgpt.config.base import Config, Count, DataPath, DenyPath, Fraction, Name

Packing = Literal["auto", "on", "off"]


class TurnsMapping(Config):
    """Where a row holds a conversation as a list of turns."""

    column: str
    """Column that holds the list."""
    role: str | int = "role"
    """Key (or index) of the speaker in a turn."""
    content: str | int = "content"
    """Key (or index) of the text in a turn."""
    user: tuple[str, ...] = ("user", "human", "patient", "client", "患者", "病人")
    """Speakers that are the user."""
    assistant: tuple[str, ...] = ("assistant", "gpt", "doctor", "counselor", "医生")
    """Speakers that are the assistant."""
    system: tuple[str, ...] = ("system",)
    """Speakers that are the system prompt."""
    pairs: tuple[str, str] | None = None
    """Keys of a question and its answer, if each turn is such a pair."""
    merge: bool = False
    """Join consecutive utterances of one speaker."""
    trim: bool = False
    """Drop the assistant's utterances before the first exchange and the user's after the last."""


class AnswersMapping(Config):
    """Where a row holds several graded answers to its prompt, as Jinja templates over an answer."""

    column: str
    """Column that holds the list; `rows` after group_by."""
    grade: str
    """Template of a number; higher is better."""
    text: str | None = None
    """Template of the answer's text."""
    turns: TurnsMapping | None = None
    """The answer is a list of turns under one of its keys. If the list begins with the prompt, the
    turns after it are the answer."""

    @model_validator(mode="after")
    def _check_one_shape(self) -> Self:
        if (self.text is None) == (self.turns is None):
            raise ValueError("set exactly one of text and turns")
        return self


class MappingConfig(Config):
    """How to convert a row of any other format to a record, as Jinja templates over its columns."""

    text: str | None = None
    """Template of a document."""
    user: str | None = None
    """Template of the user's turn."""
    assistant: str | None = None
    """Template of the assistant's turn."""
    system: str | None = None
    """Template of the system prompt."""
    turns: TurnsMapping | None = None
    """Column with a list of turns."""
    chosen: str | None = None
    """Template of the better of two answers to `user`."""
    rejected: str | None = None
    """Template of the worse answer."""
    answers: AnswersMapping | None = None
    """Graded answers to `user`."""

    @property
    def is_prompt(self) -> bool:
        """Whether the records are prompts without an answer."""
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
    """Name of the source in reports."""
    paths: Annotated[tuple[DataPath, ...], Len(1)]
    """Files, globs, directories or fsspec URIs."""
    license: Annotated[str, StringConstraints(min_length=1)]
    """License of the data; copied to the manifest and the model card."""
    sensitive: bool = False
    """Never show samples of the source in reports and logs."""
    format: Literal["auto", "txt", "jsonl", "json", "csv", "tsv", "parquet", "xlsx"] = "auto"
    """File format; auto goes by the file name. xlsx: .xlsx, .xlsm, .xls and .ods."""
    encoding: str = "auto"
    """Text encoding, a Python codec. auto accepts UTF-8, UTF-16, GB18030 (with GBK), Big5 and
    cp1252 where the text read is plausible, and refuses a file of which it is not sure."""
    delimiter: Annotated[str, StringConstraints(pattern=r"^(auto|[^\n\r\"])$")] = "auto"
    """csv and tsv only: the character between cells. auto finds a comma, tab, semicolon, bar or
    full-width comma in the first lines of csv; a tab is that of tsv."""
    sheet: str | None = None
    """xlsx only: name of the sheet; by default the only one with cells."""
    lines: bool = False
    """txt only: every line is a document, instead of every file."""
    kind: Literal[
        "auto", "text", "instruction", "history", "sharegpt", "messages", "qa", "pairs", "prompt"
    ] = "auto"
    """Format of a row. auto detects it from the columns, except prompt: a column prompt without an
    answer. pairs: columns prompt, chosen, rejected and optionally margin."""
    question_column: str = "question"
    """kind qa: column of the question."""
    answer_column: str = "answer"
    """kind qa: column of the answer."""
    mapping: MappingConfig | None = None
    """Conversion of rows of any other format."""
    ignore: tuple[str, ...] = ()
    """Columns, and keys of turns, to train without, such as `images`: they are not read and counted
    in the report. Without it, a row with an unknown key in a turn, or with a column that changes
    its meaning and is not used, is malformed."""
    group_by: str | None = None
    """Merge the rows of a file with the same value in this column: the merged row has the columns
    of the first row, and all rows in a list `rows`. The whole file is read at once."""
    weight: Annotated[float, Gt(0)] | None = None
    """Share of an epoch's tokens, relative to the other weights; set it for all sources or none."""
    deny: tuple[DenyPath, ...] = ("default",)
    """Deny-lists: `default` ships with medgpt, others are TOML files of the same format."""


class DataConfig(Config):
    sources: Annotated[tuple[SourceConfig, ...], Len(1)]
    """Sources to train on."""
    max_length: Annotated[int, Ge(16)] = 1024
    """Tokens in a packed row. Longer documents span rows, longer conversations lose old turns. With
    preferences: maximum tokens of a prompt with an answer. Longer prompts for PPO are left out."""
    packing: Packing = "auto"
    """Whether a forward reads several texts in one row. auto: if the model computes each as if it
    were alone; else, and with off, each has a padded row of its own. on: refuse other models."""
    validation_share: Fraction = 0.02
    """Share of the samples held out for validation, chosen by the hash of their content."""
    max_malformed_share: Annotated[float, Ge(0), Le(1)] = 0.01
    """The run stops if more than this share of a source's rows is malformed."""
    shard_mb: Count = 32
    """Files that can be split are read in slices of at most about this many MiB."""

    turns: Literal["all", "last"] = "all"
    """Turns of a conversation that are learned. A template that rewrites earlier turns as the
    conversation goes on (Qwen3) makes several samples of it, one for each rendering."""
    system: Literal["keep", "fold", "drop"] = "keep"
    """System messages: keep them (an error if the chat template takes none), fold them into the
    first question, or drop them."""
    thinking: Literal["keep", "strip"] = "keep"
    """Thoughts between `<think>` and `</think>` before an answer: learn them, or remove them."""

    @model_validator(mode="after")
    def _check_names_and_weights(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"source names must differ, got {', '.join(names)}")
        if len({source.weight is None for source in self.sources}) > 1:
            raise ValueError("set weight for all sources or for none")
        return self

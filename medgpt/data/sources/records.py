"""Records: the checked content of a raw row, before it is tokenized."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Source, file and row of a record."""

    source: str  # name of the source in the config
    file: str  # path or URI
    row: int  # line of a text file, otherwise row, from 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Document(Origin):
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation(Origin):
    """An optional system message, then alternating turns of user and assistant.

    Ends with the assistant, or with the user if the source holds prompts only.
    """

    messages: tuple[Message, ...]
    num_trimmed: int = 0  # messages removed before the first and after the last exchange


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences(Origin):
    """A prompt and K >= 2 answers, of which some are better than others."""

    prompt: tuple[Message, ...]  # includes its history, ends with the user
    answers: tuple[tuple[Message, ...], ...]  # (K,) each ends with the assistant
    grades: tuple[float, ...]  # (K,) higher is better; equal grades make no pair

    @property
    def messages(self) -> tuple[Message, ...]:
        """The prompt followed by its best answer."""
        return self.prompt + self.answers[self.grades.index(max(self.grades))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject(Origin):
    """A row that is not trained on. The reason never quotes the row."""

    reason: str
    malformed: bool = True  # False: a valid row set aside by a rule (deny-list, length)
    unreadable: bool = False  # the rest of the file cannot be read; its number of rows is unknown

    @classmethod
    def of(cls, origin: Origin, reason: str, **flags: bool) -> "Reject":
        """Reject the row of `origin`."""
        return cls(source=origin.source, file=origin.file, row=origin.row, reason=reason, **flags)


Record = Document | Conversation | Preferences

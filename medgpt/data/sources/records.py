"""What a raw row becomes before it is tokenised."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a record comes from."""

    source: str  # name of the source in the config
    file: str  # path or URI
    row: int  # line of a text file, else row, from 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Document(Origin):
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation(Origin):
    """An optional system message, then user and assistant in turn, ending with the assistant; with
    the user where a source holds prompts alone."""

    messages: tuple[Message, ...]
    num_trimmed: int = 0  # messages left out before the first and after the last exchange


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences(Origin):
    """A prompt and K >= 2 answers to it, some of them better than others."""

    prompt: tuple[Message, ...]  # with its history, ends with the user
    answers: tuple[tuple[Message, ...], ...]  # (K,) each ends with the assistant
    grades: tuple[float, ...]  # (K,) the higher the better; equal grades compare nothing

    @property
    def messages(self) -> tuple[Message, ...]:
        """The prompt with its best answer."""
        return self.prompt + self.answers[self.grades.index(max(self.grades))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject(Origin):
    """A row that is not trained on. The reason never quotes the row."""

    reason: str
    malformed: bool = True  # False: a good row set aside by a rule (deny-list, length)
    unreadable: bool = False  # the file cannot be read from here on, its other rows are unknown


Record = Document | Conversation | Preferences

"""Records: the checked content of a raw row, before it is tokenized."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str  # empty only if the assistant calls tools, or a tool returned nothing
    learn: bool = True  # False: an assistant turn that is context and no target of the loss
    tool_calls: str | None = None  # JSON of [{"name": str, "arguments": object}, ...]

    def __repr__(self) -> str:
        # hashes of evaluations contain it: a message without further fields keeps its form
        fields = zip(("role", "content", "learn", "tool_calls"), self.to_list(), strict=False)
        return f"Message({', '.join(f'{name}={value!r}' for name, value in fields)})"

    @property
    def text(self) -> str:
        """The content, followed by the tool calls as JSON."""
        return "\n".join(part for part in (self.content, self.tool_calls) if part)

    def to_list(self) -> list[Any]:
        """Return [role, content], and the other fields if one of them has no default.

        `Message(*fields)` restores the message. Hashes of samples contain this list, so a message
        without further fields keeps its hash.
        """
        fields = [self.role, self.content, self.learn, self.tool_calls]
        while fields[-1] is True or fields[-1] is None:
            fields.pop()
        return fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Source, file and row of a record."""

    source: str  # name of the source in the config
    file: str  # path or URI
    row: int  # line of a text file, otherwise row, from 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Content(Origin):
    """What the records of all kinds have."""

    # columns and turn keys of the row that nothing read
    unused: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Document(Content):
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation(Content):
    """An optional system message, then alternating turns of user and assistant.

    Between the user's turn and the answer, the assistant may call tools, and each call is followed
    by the results. Ends with the assistant, or before its turn if the source holds prompts only.
    """

    messages: tuple[Message, ...]
    # JSON list of the tools that the assistant may call; not in the hashes of evaluations
    tools: str | None = field(default=None, repr=False)
    num_trimmed: int = 0  # messages removed before the first and after the last exchange


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences(Content):
    """A prompt and K >= 2 answers, of which some are better than others.

    Or one answer that is good (grade 1) or bad (grade -1).
    """

    prompt: tuple[Message, ...]  # includes its history, ends with the user
    answers: tuple[tuple[Message, ...], ...]  # (K,) each ends with the assistant
    grades: tuple[float, ...]  # (K,) higher is better; equal grades make no pair
    tools: str | None = None  # JSON list of the tools that the assistant may call

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


def prompt_to_json(messages: Sequence[Message], tools: str | None = None) -> str:
    """Return the messages of a prompt as JSON, and its tools if it has any."""
    turns = [message.to_list() for message in messages]
    content = turns if tools is None else {"messages": turns, "tools": tools}
    return json.dumps(content, ensure_ascii=False)


def prompt_from_json(text: str) -> dict[str, Any]:
    """Return `messages` (a tuple) and `tools` of a prompt that `prompt_to_json` wrote."""
    content = json.loads(text)
    turns, tools = (
        (content["messages"], content["tools"]) if "tools" in content else (content, None)
    )
    return {"messages": tuple(Message(*turn) for turn in turns), "tools": tools}

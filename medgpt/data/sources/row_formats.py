"""One row of a known shape in, one record or one reject out."""

from typing import Any

from medgpt.config.data import SourceConfig, TurnsMapping
from medgpt.data.sources.clean import clean
from medgpt.data.sources.mapping import Mapper
from medgpt.data.sources.preferences import Ranked, pair_columns, preferences, read_pair
from medgpt.data.sources.records import (
    Conversation,
    Document,
    Message,
    Origin,
    Record,
    Reject,
    Role,
)
from medgpt.data.sources.turns import (
    Malformed,
    Row,
    Unusable,
    cell,
    check_turns,
    list_of,
    read_turns,
    text_of,
    trim,
)

QA_COLUMNS = (("question", "answer"), ("prompt", "response"), ("query", "response"))
SHAREGPT = TurnsMapping(column="conversations", role="from", content="value")
MESSAGES = TurnsMapping(column="messages")
LONGEST_NAME = 32  # a file without header has values where names should be


class Recogniser:
    """Makes records of the rows of one source."""

    def __init__(self, source: SourceConfig) -> None:
        """Raises ConfigError if a template of the mapping is wrong."""
        self._source = source
        self._mapper = None if source.mapping is None else Mapper(source.name, source.mapping)
        turns = None if source.mapping is None else source.mapping.turns
        self._trim = turns is not None and turns.trim
        mapped = source.mapping is not None and source.mapping.is_prompt
        prompts = mapped or (source.mapping is None and source.kind == "prompt")
        self._last: Role = "user" if prompts else "assistant"

    def __call__(self, row: Row, origin: Origin) -> Record | Reject:
        place: dict[str, Any] = {"source": origin.source, "file": origin.file, "row": origin.row}
        try:
            found = self._mapper(row) if self._mapper else self._by_kind(row)
            if isinstance(found, str):
                return Document(text=found, **place)
            if isinstance(found, Ranked):
                return preferences(found, origin)
            kept = trim(found, "the conversation") if self._trim else found
            return Conversation(
                messages=check_turns(kept, "the conversation", last=self._last),
                num_trimmed=len(found) - len(kept),
                **place,
            )
        except Malformed as problem:
            malformed = not isinstance(problem, Unusable)
            return Reject(reason=str(problem), malformed=malformed, **place)

    def _by_kind(self, row: Row) -> str | list[Message] | Ranked:
        kind = self._kind(row) if self._source.kind == "auto" else self._source.kind
        try:
            match kind:
                case "text":
                    column = "text" if "text" in row else "content"
                    return text_of(cell(row, column), f"column {column}")
                case "instruction":
                    return _system(row) + _exchange(row)
                case "history":
                    return _system(row) + _history(row) + _exchange(row)
                case "sharegpt":
                    return _system(row) + read_turns(row, SHAREGPT)
                case "messages":
                    return _system(row) + read_turns(row, MESSAGES)
                case "qa":
                    question, answer = self._qa(row) or self._configured()
                    return [
                        Message("user", text_of(cell(row, question), f"column {question}")),
                        Message("assistant", text_of(cell(row, answer), f"column {answer}")),
                    ]
                case "pairs":
                    return read_pair(row, _system(row) + _history(row))
                case "prompt":
                    prompt = Message("user", text_of(cell(row, "prompt"), "column prompt"))
                    return [*_system(row), *_history(row), prompt]
        except Malformed as problem:
            raise Malformed(f"kind {kind}: {problem}") from None
        raise AssertionError(kind)

    def _kind(self, row: Row) -> str:
        """The kind that the columns show."""
        if pair_columns(row) or ("chosen" in row and "rejected" in row):
            return "pairs"
        if "messages" in row:
            return "messages"
        if "conversations" in row:
            return "sharegpt"
        if "instruction" in row and "output" in row:
            return "history" if "history" in row else "instruction"
        if self._qa(row):
            return "qa"
        if "text" in row or "content" in row:
            return "text"
        names = [n if len(n) <= LONGEST_NAME else f"<{len(n)} characters>" for n in row]
        raise Malformed(f"no known shape in columns {', '.join(names)}; set kind or mapping")

    def _configured(self) -> tuple[str, str]:
        return self._source.question_column, self._source.answer_column

    def _qa(self, row: Row) -> tuple[str, str] | None:
        pairs = (self._configured(), *QA_COLUMNS)
        return next((pair for pair in pairs if pair[0] in row and pair[1] in row), None)


def _system(row: Row) -> list[Message]:
    """Many sets keep the system prompt in a column of its own, often empty."""
    if row.get("system") is None or row["system"] == "":
        return []
    return [Message("system", text_of(row["system"], "column system"))]


def _exchange(row: Row) -> list[Message]:
    """instruction, with a non-empty input on the next line, and output."""
    parts = [cell(row, "instruction"), row.get("input")]
    for part, column in zip(parts, ("instruction", "input"), strict=True):
        if part is not None and not isinstance(part, str):
            text_of(part, f"column {column}")
    question = "\n".join(text for part in parts if part and (text := clean(part)))
    return [
        Message("user", text_of(question, "column instruction")),
        Message("assistant", text_of(cell(row, "output"), "column output")),
    ]


def _history(row: Row) -> list[Message]:
    """Earlier turns: a list of [question, answer], also as JSON, or nothing."""
    value = row.get("history")
    if value in (None, "", [], "[]"):
        return []
    messages: list[Message] = []
    for number, pair in enumerate(list_of(row, "history"), start=1):
        what = f"column history, turn {number}"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise Malformed(f"{what} must be a question and an answer")
        messages.append(Message("user", text_of(pair[0], f"{what}, question")))
        messages.append(Message("assistant", text_of(pair[1], f"{what}, answer")))
    return messages

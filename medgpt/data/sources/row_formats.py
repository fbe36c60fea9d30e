"""Parses rows in the known dataset formats: one row in, one record or reject out."""

from typing import Any

from medgpt.config.data import SourceConfig, TurnsMapping
from medgpt.data.sources.clean import clean_text
from medgpt.data.sources.mapping import RowMapper
from medgpt.data.sources.preferences import RankedAnswers, make_preferences, pair_columns, read_pair
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
    MalformedRow,
    RawRow,
    UnusableRow,
    check_turns,
    read_turns,
    require_column,
    require_list,
    require_text,
    trim_unanswered,
)

QA_COLUMNS = (("question", "answer"), ("prompt", "response"), ("query", "response"))
SHAREGPT = TurnsMapping(column="conversations", role="from", content="value")
MESSAGES = TurnsMapping(column="messages")
MAX_COLUMN_NAME = 32  # characters; a file without a header has values instead of names


class RowParser:
    """Parses the rows of one source into records."""

    def __init__(self, source: SourceConfig) -> None:
        """Raises ConfigError if a template of the mapping is invalid."""
        self._source = source
        self._mapper = None if source.mapping is None else RowMapper(source.name, source.mapping)
        turns = None if source.mapping is None else source.mapping.turns
        self._trim = turns is not None and turns.trim
        mapped = source.mapping is not None and source.mapping.is_prompt
        prompts = mapped or (source.mapping is None and source.kind == "prompt")
        self._last: Role = "user" if prompts else "assistant"

    def __call__(self, row: RawRow, origin: Origin) -> Record | Reject:
        origin_fields: dict[str, Any] = {
            "source": origin.source,
            "file": origin.file,
            "row": origin.row,
        }
        try:
            parsed = self._mapper(row) if self._mapper else self._by_kind(row)
            if isinstance(parsed, str):
                return Document(text=parsed, **origin_fields)
            if isinstance(parsed, RankedAnswers):
                return make_preferences(parsed, origin)
            messages = trim_unanswered(parsed, "the conversation") if self._trim else parsed
            return Conversation(
                messages=check_turns(messages, "the conversation", last_role=self._last),
                num_trimmed=len(parsed) - len(messages),
                **origin_fields,
            )
        except MalformedRow as problem:
            malformed = not isinstance(problem, UnusableRow)
            return Reject.of(origin, str(problem), malformed=malformed)

    def _by_kind(self, row: RawRow) -> str | list[Message] | RankedAnswers:
        kind = self._kind(row) if self._source.kind == "auto" else self._source.kind
        try:
            match kind:
                case "text":
                    column = "text" if "text" in row else "content"
                    return require_text(require_column(row, column), f"column {column}")
                case "instruction":
                    return _system_message(row) + _instruction_messages(row)
                case "history":
                    return (
                        _system_message(row) + _history_messages(row) + _instruction_messages(row)
                    )
                case "sharegpt":
                    return _system_message(row) + read_turns(row, SHAREGPT)
                case "messages":
                    return _system_message(row) + read_turns(row, MESSAGES)
                case "qa":
                    question, answer = self._qa(row) or self._configured()
                    return [
                        Message(
                            "user",
                            require_text(require_column(row, question), f"column {question}"),
                        ),
                        Message(
                            "assistant",
                            require_text(require_column(row, answer), f"column {answer}"),
                        ),
                    ]
                case "pairs":
                    return read_pair(row, _system_message(row) + _history_messages(row))
                case "prompt":
                    prompt = Message(
                        "user", require_text(require_column(row, "prompt"), "column prompt")
                    )
                    return [*_system_message(row), *_history_messages(row), prompt]
        except MalformedRow as problem:
            raise MalformedRow(f"kind {kind}: {problem}") from None
        raise AssertionError(kind)

    def _kind(self, row: RawRow) -> str:
        """Infer the kind from the columns. Raises MalformedRow if they match none."""
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
        names = [n if len(n) <= MAX_COLUMN_NAME else f"<{len(n)} characters>" for n in row]
        raise MalformedRow(f"no known shape in columns {', '.join(names)}; set kind or mapping")

    def _configured(self) -> tuple[str, str]:
        return self._source.question_column, self._source.answer_column

    def _qa(self, row: RawRow) -> tuple[str, str] | None:
        pairs = (self._configured(), *QA_COLUMNS)
        return next((pair for pair in pairs if pair[0] in row and pair[1] in row), None)


def _system_message(row: RawRow) -> list[Message]:
    """Return the system message in column `system`, which many datasets have, often empty."""
    if row.get("system") is None or row["system"] == "":
        return []
    return [Message("system", require_text(row["system"], "column system"))]


def _instruction_messages(row: RawRow) -> list[Message]:
    """Return `instruction`, with a non-empty `input` on the next line, and `output`."""
    parts = [require_column(row, "instruction"), row.get("input")]
    for part, column in zip(parts, ("instruction", "input"), strict=True):
        if part is not None and not isinstance(part, str):
            require_text(part, f"column {column}")
    question = "\n".join(text for part in parts if part and (text := clean_text(part)))
    return [
        Message("user", require_text(question, "column instruction")),
        Message("assistant", require_text(require_column(row, "output"), "column output")),
    ]


def _history_messages(row: RawRow) -> list[Message]:
    """Return the earlier turns in `history`: [question, answer] pairs, possibly as JSON text."""
    value = row.get("history")
    if value in (None, "", [], "[]"):
        return []
    messages: list[Message] = []
    for number, pair in enumerate(require_list(row, "history"), start=1):
        location = f"column history, turn {number}"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise MalformedRow(f"{location} must be a question and an answer")
        messages.append(Message("user", require_text(pair[0], f"{location}, question")))
        messages.append(Message("assistant", require_text(pair[1], f"{location}, answer")))
    return messages

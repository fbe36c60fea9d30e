"""Parses rows in the known dataset formats: one row in, one record or reject out."""

from typing import Any

from medgpt.config.data import SourceConfig
from medgpt.data.sources.chat_columns import (
    chat_messages,
    column_messages,
    history_messages,
    instruction_message,
    system_message,
)
from medgpt.data.sources.loss_flags import LOSS_KEYS, read_loss_flag
from medgpt.data.sources.mapping import RowMapper
from medgpt.data.sources.preferences import (
    RankedAnswers,
    make_preferences,
    read_labeled,
    read_pair,
    with_chosen_and_rejected,
)
from medgpt.data.sources.records import (
    Conversation,
    Document,
    Message,
    Origin,
    Record,
    Reject,
    Role,
)
from medgpt.data.sources.row_values import (
    MalformedRow,
    RawRow,
    UnusableRow,
    is_empty,
    require_column,
    require_text,
    shown_name,
)
from medgpt.data.sources.tools import TOOL_COLUMNS, read_tools
from medgpt.data.sources.turns import check_turns, trim_unanswered
from medgpt.data.sources.unused_keys import UnusedKeys

QA_COLUMNS = (
    ("question", "answer"),
    ("prompt", "response"),
    ("query", "response"),
    ("prompt", "completion"),
)
NOTHING_TO_LEARN = "no turn of the assistant is to be learned"


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
        keys = UnusedKeys(self._source.ignore, mapped=self._mapper is not None)
        try:
            return self._parse(keys.drop_ignored(row, "column"), origin, keys)
        except MalformedRow as problem:
            malformed = not isinstance(problem, UnusableRow)
            return Reject.of(origin, str(problem), malformed=malformed)

    def _parse(self, row: RawRow, origin: Origin, keys: UnusedKeys) -> Record:
        if self._source.group_by is not None:
            keys.use(self._source.group_by)
        if self._mapper:
            parsed = self._mapper(row, keys)
        else:
            row = with_chosen_and_rejected(row)
            parsed = self._by_kind(row, keys)
        tools = None
        if not isinstance(parsed, str) and not keys.is_used(*TOOL_COLUMNS):
            tools = read_tools(row)
            keys.use(*TOOL_COLUMNS)
        keys.check_columns(row)
        fields: dict[str, Any] = {
            "source": origin.source,
            "file": origin.file,
            "row": origin.row,
            "unused": tuple(sorted(keys.names)),
        }
        if isinstance(parsed, str):
            return Document(text=parsed, **fields)
        if isinstance(parsed, RankedAnswers):
            return make_preferences(parsed, tools, **fields)
        messages = trim_unanswered(parsed, "the conversation") if self._trim else parsed
        checked = check_turns(messages, "the conversation", last_role=self._last)
        if self._last == "assistant" and not any(m.learn for m in checked if m.role == "assistant"):
            raise UnusableRow(NOTHING_TO_LEARN)
        return Conversation(
            messages=checked, tools=tools, num_trimmed=len(parsed) - len(messages), **fields
        )

    def _by_kind(self, row: RawRow, keys: UnusedKeys) -> str | list[Message] | RankedAnswers:
        kind = self._kind(row) if self._source.kind == "auto" else self._source.kind
        try:
            if kind == "text":
                column = "text" if "text" in row else "content"
                keys.use(column)
                return require_text(require_column(row, column), f"column {column}")
            if kind == "pairs":
                return read_pair(row, keys)
            messages = self._messages(row, kind, keys)
            if all(m.role == "assistant" and m.tool_calls is None for m in messages):
                if not all(message.learn for message in messages):
                    raise UnusableRow(NOTHING_TO_LEARN)
                return "\n".join(message.content for message in messages)
            return self._with_label(row, messages, keys)
        except MalformedRow as problem:
            raise type(problem)(f"kind {kind}: {problem}") from None

    def _messages(self, row: RawRow, kind: str, keys: UnusedKeys) -> list[Message]:
        """Return the messages of a row of a kind that has them."""
        system = system_message(row, keys)
        if kind in ("sharegpt", "messages"):
            keys.use(*LOSS_KEYS)
            column = "messages" if kind == "messages" else "conversations"
            messages = chat_messages(row, column, keys)
            if not read_loss_flag(row, "assistant", "the row"):
                raise UnusableRow(NOTHING_TO_LEARN)
            return system + messages
        before = system + history_messages(row, keys)
        if kind in ("instruction", "history"):
            question = instruction_message(row, keys)
            return [*before, question, *column_messages(row, "output", "assistant", keys)]
        if kind == "qa":
            question, answer = self._qa(row) or self._configured()
            before += column_messages(row, question, "user", keys)
            return before + column_messages(row, answer, "assistant", keys)
        assert kind == "prompt", kind
        return before + column_messages(row, "prompt", "user", keys)

    def _with_label(
        self, row: RawRow, messages: list[Message], keys: UnusedKeys
    ) -> list[Message] | RankedAnswers:
        """Return the messages as an answer that is good or bad if the row says so."""
        if not is_empty(row.get("kto_tag")):
            keys.use("kto_tag")
            return read_labeled(messages, row["kto_tag"], "kto_tag")
        if isinstance(row.get("label"), bool) and ("completion" in row or "messages" in row):
            keys.use("label")
            return read_labeled(messages, row["label"], "label")
        return messages

    def _kind(self, row: RawRow) -> str:
        """Infer the kind from the columns. Raises MalformedRow if they match none."""
        if "chosen" in row and "rejected" in row:
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
        names = map(shown_name, row)
        raise MalformedRow(f"no known shape in columns {', '.join(names)}; set kind or mapping")

    def _configured(self) -> tuple[str, str]:
        return self._source.question_column, self._source.answer_column

    def _qa(self, row: RawRow) -> tuple[str, str] | None:
        pairs = (self._configured(), *QA_COLUMNS)
        return next((pair for pair in pairs if pair[0] in row and pair[1] in row), None)

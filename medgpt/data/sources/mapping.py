"""Converts rows of any shape with the Jinja templates of a `[data.sources.mapping]`."""

from collections.abc import Iterable
from dataclasses import dataclass

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, Undefined, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from medgpt.config.base import ConfigError
from medgpt.config.data import AnswersMapping, MappingConfig, TurnsMapping
from medgpt.data.sources.preferences import RankedAnswers, require_number, strip_prompt
from medgpt.data.sources.records import Message
from medgpt.data.sources.row_values import (
    MalformedRow,
    RawRow,
    json_type,
    require_list,
    require_text,
)
from medgpt.data.sources.turns import read_turns
from medgpt.data.sources.unused_keys import UnusedKeys

# exceptions that a template may raise because of the row
TEMPLATE_ERRORS = (
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)


def _require_printable(value: object) -> object:
    """Accept text and numbers only: Python would print null as None and a list with brackets."""
    if isinstance(value, (str, int, float, Undefined)) and not isinstance(value, bool):
        return value
    raise MalformedRow(f"prints {json_type(value)}, must print text or a number")


JINJA_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, finalize=_require_printable, trim_blocks=True, lstrip_blocks=True
)


@dataclass(frozen=True, slots=True)
class RowTemplate:
    """A compiled template. Its variables are the columns, and `row` for the whole row."""

    key: str  # config key, for messages
    template: Template
    columns: frozenset[str]  # columns that the template uses; `row` is the whole row

    def render(self, row: RawRow) -> str:
        """Return the cleaned text. Raises MalformedRow if it is empty or a column is missing."""
        try:
            text = self.template.render({"row": row, **row})
        except MalformedRow as problem:
            raise MalformedRow(f"{self.key} {problem}") from None
        except (TemplateError, *TEMPLATE_ERRORS) as error:
            missing = sorted(self.columns - {"row"} - set(row))
            if missing:
                raise MalformedRow(f"{self.key}: column {', '.join(missing)} is missing") from None
            raise MalformedRow(
                f"{self.key} does not fit the row ({type(error).__name__})"
            ) from None
        return require_text(text, self.key)


def compile_template(source: str, key: str, text: str) -> RowTemplate:
    """Compile a template. Raises ConfigError if `text` is not a Jinja template."""
    try:
        columns = meta.find_undeclared_variables(JINJA_ENVIRONMENT.parse(text))
        return RowTemplate(key, JINJA_ENVIRONMENT.from_string(text), frozenset(columns))
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"data.sources {source} {key}: not a Jinja template; "
            f"line {error.lineno}: {error.message}"
        ) from None


class RowMapper:
    """Applies one mapping to rows."""

    def __init__(self, source: str, mapping: MappingConfig) -> None:
        """Raises ConfigError for an invalid template."""
        names = ("text", "system", "user", "assistant", "chosen", "rejected")
        texts = {name: getattr(mapping, name) for name in names}
        if mapping.answers is not None:
            texts |= {f"answers.{n}": getattr(mapping.answers, n) for n in ("text", "grade")}
        self._templates = {
            name: compile_template(source, f"mapping.{name}", text)
            for name, text in texts.items()
            if text is not None
        }
        self._turns, self._answers = mapping.turns, mapping.answers
        by_answer = {name for name in texts if name.startswith("answers.")}
        self._columns = self._columns_of(texts.keys() - by_answer)
        self._answer_columns = self._columns | self._columns_of(by_answer)

    def _columns_of(self, names: Iterable[str]) -> set[str]:
        """Return the columns that these templates use."""
        templates = (self._templates[name] for name in names if name in self._templates)
        return set().union(*(template.columns for template in templates))

    def __call__(self, row: RawRow, keys: UnusedKeys) -> str | list[Message] | RankedAnswers:
        """Return the text of a document, messages, or ranked answers. Raises MalformedRow."""
        keys.use(*self._columns, *(row if "row" in self._columns else ()))
        templates = self._templates
        if "text" in templates:
            return templates["text"].render(row)
        system = (
            [Message("system", templates["system"].render(row))] if "system" in templates else []
        )
        if self._turns is not None:
            return system + self._read_turns(row, self._turns, keys)
        prompt = [*system, Message("user", templates["user"].render(row))]
        if self._answers is not None:
            return self._read_graded_answers(row, prompt, self._answers, keys)
        replies = {
            name: [Message("assistant", templates[name].render(row))]
            for name in ("assistant", "chosen", "rejected")
            if name in templates
        }
        if "chosen" in replies:
            return RankedAnswers(prompt, [replies["chosen"], replies["rejected"]], [1.0, 0.0])
        return prompt + replies.get("assistant", [])

    def _read_turns(self, row: RawRow, turns: TurnsMapping, keys: UnusedKeys) -> list[Message]:
        # templates may read other keys of the turns
        turn_keys = keys.without_counts() if keys.is_used(turns.column) else keys
        keys.use(turns.column)
        return read_turns(
            require_list(row, turns.column), turns, f"column {turns.column}", turn_keys
        )

    def _read_graded_answers(
        self, row: RawRow, prompt: list[Message], mapping: AnswersMapping, keys: UnusedKeys
    ) -> RankedAnswers:
        """Return the answers in a column with their grades."""
        keys.use(mapping.column)
        answers, grades = [], []
        for number, item in enumerate(require_list(row, mapping.column), start=1):
            location = f"column {mapping.column}, answer {number}"
            if not isinstance(item, dict):
                raise MalformedRow(f"{location} is {json_type(item)}, must be an object")
            try:
                answers.append(self._read_answer(item, prompt, mapping, keys))
                grades.append(
                    require_number(self._templates["answers.grade"].render(item), "its grade")
                )
            except MalformedRow as problem:
                raise MalformedRow(f"{location}: {problem}") from None
        return RankedAnswers(prompt, answers, grades)

    def _read_answer(
        self, item: RawRow, prompt: list[Message], mapping: AnswersMapping, keys: UnusedKeys
    ) -> list[Message]:
        item = keys.drop_ignored(item, "column")
        item_keys = keys.for_part(*self._answer_columns)
        if mapping.turns is None:
            answer = [Message("assistant", self._templates["answers.text"].render(item))]
        else:
            answer = strip_prompt(prompt, self._read_turns(item, mapping.turns, item_keys))
        if "row" not in self._answer_columns:
            item_keys.check_columns(item)
        return answer

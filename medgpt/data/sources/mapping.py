"""Converts rows of any shape with the Jinja templates of a `[data.sources.mapping]`."""

from dataclasses import dataclass

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, Undefined, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from medgpt.config.base import ConfigError
from medgpt.config.data import MappingConfig
from medgpt.data.sources.preferences import RankedAnswers, require_number, strip_prompt
from medgpt.data.sources.records import Message
from medgpt.data.sources.turns import (
    MalformedRow,
    RawRow,
    json_type,
    read_turns,
    require_list,
    require_text,
)

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
    columns: frozenset[str]  # columns that the template uses

    def render(self, row: RawRow) -> str:
        """Return the cleaned text. Raises MalformedRow if it is empty or a column is missing."""
        try:
            text = self.template.render({"row": row, **row})
        except MalformedRow as problem:
            raise MalformedRow(f"{self.key} {problem}") from None
        except (TemplateError, *TEMPLATE_ERRORS) as error:
            missing = sorted(self.columns - set(row))
            if missing:
                raise MalformedRow(f"{self.key}: column {', '.join(missing)} is missing") from None
            raise MalformedRow(
                f"{self.key} does not fit the row ({type(error).__name__})"
            ) from None
        return require_text(text, self.key)


def compile_template(source: str, key: str, text: str) -> RowTemplate:
    """Compile a template. Raises ConfigError if `text` is not a Jinja template."""
    try:
        columns = meta.find_undeclared_variables(JINJA_ENVIRONMENT.parse(text)) - {"row"}
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

    def __call__(self, row: RawRow) -> str | list[Message] | RankedAnswers:
        """Return the text of a document, messages, or ranked answers. Raises MalformedRow."""
        templates = self._templates
        if "text" in templates:
            return templates["text"].render(row)
        system = (
            [Message("system", templates["system"].render(row))] if "system" in templates else []
        )
        if self._turns is not None:
            return system + read_turns(row, self._turns)
        prompt = [*system, Message("user", templates["user"].render(row))]
        if self._answers is not None:
            return self._read_graded_answers(row, prompt)
        replies = {
            name: [Message("assistant", templates[name].render(row))]
            for name in ("assistant", "chosen", "rejected")
            if name in templates
        }
        if "chosen" in replies:
            return RankedAnswers(prompt, [replies["chosen"], replies["rejected"]], [1.0, 0.0])
        return prompt + replies.get("assistant", [])

    def _read_graded_answers(self, row: RawRow, prompt: list[Message]) -> RankedAnswers:
        """Return the answers in a column with their grades."""
        assert self._answers is not None
        answers, grades = [], []
        for number, item in enumerate(require_list(row, self._answers.column), start=1):
            location = f"column {self._answers.column}, answer {number}"
            if not isinstance(item, dict):
                raise MalformedRow(f"{location} is {json_type(item)}, must be an object")
            try:
                if self._answers.turns is None:
                    text = self._templates["answers.text"].render(item)
                    answers.append([Message("assistant", text)])
                else:
                    answers.append(strip_prompt(prompt, read_turns(item, self._answers.turns)))
                grades.append(
                    require_number(self._templates["answers.grade"].render(item), "its grade")
                )
            except MalformedRow as problem:
                raise MalformedRow(f"{location}: {problem}") from None
        return RankedAnswers(prompt, answers, grades)

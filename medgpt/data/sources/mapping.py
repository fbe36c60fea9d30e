"""Records out of rows of any shape, by the Jinja templates of a `[data.sources.mapping]`."""

from dataclasses import dataclass

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, Undefined, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from medgpt.config.base import ConfigError
from medgpt.config.data import MappingConfig
from medgpt.data.sources.preferences import Ranked, after, number_of
from medgpt.data.sources.records import Message
from medgpt.data.sources.turns import Malformed, Row, kind_of, list_of, read_turns, text_of

# what a template may raise because of the row it gets
ROW_ERRORS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


def _printable(value: object) -> object:
    """Text and numbers only: Python would print null as None and a list with its brackets."""
    if isinstance(value, (str, int, float, Undefined)) and not isinstance(value, bool):
        return value
    raise Malformed(f"prints {kind_of(value)}, must print text or a number")


ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, finalize=_printable, trim_blocks=True, lstrip_blocks=True
)


@dataclass(frozen=True, slots=True)
class RowTemplate:
    """A compiled template; the row's columns are its variables, `row` is the row itself."""

    key: str  # of the config, for messages
    template: Template
    columns: frozenset[str]  # that it may use

    def render(self, row: Row) -> str:
        """Cleaned text, not empty. Raises Malformed."""
        try:
            text = self.template.render({"row": row, **row})
        except Malformed as problem:
            raise Malformed(f"{self.key} {problem}") from None
        except (TemplateError, *ROW_ERRORS) as error:
            missing = sorted(self.columns - set(row))
            if missing:
                raise Malformed(f"{self.key}: column {', '.join(missing)} is missing") from None
            raise Malformed(f"{self.key} does not fit the row ({type(error).__name__})") from None
        return text_of(text, self.key)


def compile_template(source: str, key: str, text: str) -> RowTemplate:
    """Raises ConfigError if `text` is not a Jinja template."""
    try:
        columns = meta.find_undeclared_variables(ENVIRONMENT.parse(text)) - {"row"}
        return RowTemplate(key, ENVIRONMENT.from_string(text), frozenset(columns))
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"data.sources {source} {key}: not a Jinja template; "
            f"line {error.lineno}: {error.message}"
        ) from None


class Mapper:
    """Applies one mapping to rows."""

    def __init__(self, source: str, mapping: MappingConfig) -> None:
        """Raises ConfigError."""
        texts = {
            "text": mapping.text,
            "system": mapping.system,
            "user": mapping.user,
            "assistant": mapping.assistant,
            "chosen": mapping.chosen,
            "rejected": mapping.rejected,
            "answers.text": mapping.answers and mapping.answers.text,
            "answers.grade": mapping.answers and mapping.answers.grade,
        }
        self._templates = {
            name: compile_template(source, f"mapping.{name}", text)
            for name, text in texts.items()
            if text is not None
        }
        self._turns, self._answers = mapping.turns, mapping.answers

    def __call__(self, row: Row) -> str | list[Message] | Ranked:
        """A document's text, messages, or answers to compare. Raises Malformed."""
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
            return self._graded(row, prompt)
        said = {
            name: [Message("assistant", templates[name].render(row))]
            for name in ("assistant", "chosen", "rejected")
            if name in templates
        }
        if "chosen" in said:
            return Ranked(prompt, [said["chosen"], said["rejected"]], [1.0, 0.0])
        return prompt + said.get("assistant", [])

    def _graded(self, row: Row, prompt: list[Message]) -> Ranked:
        """The answers in a column with their grades."""
        assert self._answers is not None
        answers, grades = [], []
        for number, item in enumerate(list_of(row, self._answers.column), start=1):
            what = f"column {self._answers.column}, answer {number}"
            if not isinstance(item, dict):
                raise Malformed(f"{what} is {kind_of(item)}, must be an object")
            try:
                if self._answers.turns is None:
                    text = self._templates["answers.text"].render(item)
                    answers.append([Message("assistant", text)])
                else:
                    answers.append(after(prompt, read_turns(item, self._answers.turns)))
                grades.append(number_of(self._templates["answers.grade"].render(item), "its grade"))
            except Malformed as problem:
                raise Malformed(f"{what}: {problem}") from None
        return Ranked(prompt, answers, grades)

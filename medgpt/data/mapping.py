"""Records out of rows of any shape, by the Jinja templates of a `[data.sources.mapping]`."""

from dataclasses import dataclass

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, Undefined, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from medgpt.config import ConfigError, MappingConfig
from medgpt.data.records import Message
from medgpt.data.turns import Malformed, Row, kind_of, read_turns, text_of

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
        }
        self._templates = {
            name: compile_template(source, f"mapping.{name}", text)
            for name, text in texts.items()
            if text is not None
        }
        self._turns = mapping.turns

    def __call__(self, row: Row) -> str | list[Message]:
        """A document's text, or messages. Raises Malformed."""
        templates = self._templates
        if "text" in templates:
            return templates["text"].render(row)
        system = (
            [Message("system", templates["system"].render(row))] if "system" in templates else []
        )
        if self._turns is not None:
            return system + read_turns(row, self._turns)
        user, assistant = templates["user"].render(row), templates["assistant"].render(row)
        return [*system, Message("user", user), Message("assistant", assistant)]

"""Chooses the chat template of a run, and freezes in it what could change from day to day."""

import copy
import re
from datetime import date
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from medgpt.config.base import ConfigError, did_you_mean
from medgpt.config.model import DEFAULT_DATE, TokenizerConfig

_STRFTIME_CALL = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_SWITCH = re.compile(r"(?<![\w.])(enable_thinking|thinking)\s+is\s+(?:not\s+)?defined")
_SET_SWITCH = "{{%- if {0} is not defined -%}}{{%- set {0} = {1} -%}}{{%- endif -%}}"


def thinking_switch(template: str) -> str | None:
    """Return the variable that switches thinking on and off in the template, if it has one."""
    found = _SWITCH.search(template)
    return found[1] if found else None


def freeze_template(
    tokenizer: PreTrainedTokenizerFast, config: TokenizerConfig
) -> PreTrainedTokenizerFast:
    """Return a copy with the template of the config, its date and its mode of thinking.

    Raises ConfigError if there is no such template, or it has no switch for thinking.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if config.chat_template is not None:
        tokenizer.chat_template = read_template(config.chat_template)
    if tokenizer.chat_template is None:
        return tokenizer
    template = freeze_date(tokenizer.get_chat_template(), config.date)
    if config.thinking != "auto":
        if (switch := thinking_switch(template)) is None:
            raise ConfigError(
                f"tokenizer.thinking={config.thinking}: the chat template has no switch for "
                "thinking; leave it at auto: answers are then taught as the data have them, with "
                "or without a thought"
            )
        value = "true" if config.thinking == "on" else "false"
        template = _SET_SWITCH.format(switch, value) + template
    tokenizer.chat_template = template
    return tokenizer


def freeze_date(template: str, day: date = DEFAULT_DATE) -> str:
    """Return the template with `day` in place of the day on which it is rendered.

    Raises ConfigError if the template asks for the time in a way that is not known.
    """
    frozen = _STRFTIME_CALL.sub(lambda call: repr(day.strftime(call[2])), template)
    if re.search(r"strftime_now\s*\(", frozen):
        raise ConfigError(
            "the chat template computes the format of its date, so that training and generation "
            "would see different prompts; write the date into a template of your own and name it "
            "in tokenizer.chat_template"
        )
    return frozen


def read_template(name: str) -> str:
    """Return the text of a template: a file, or one of those that TRL ships.

    Raises ConfigError if there is none.
    """
    path = Path(name)
    if path.is_absolute():
        if not path.is_file():
            raise ConfigError(f"tokenizer.chat_template={name}: there is no such file")
        return path.read_text("utf-8")
    spec = find_spec("trl")
    assert spec is not None, "trl is a dependency of medgpt"
    assert spec.origin is not None, "trl is a package with files"
    shipped = Path(spec.origin).parent / "chat_templates"
    known = sorted(file.stem for file in shipped.glob("*.jinja"))
    if name not in known:
        hint = did_you_mean(name, known)
        raise ConfigError(
            f"tokenizer.chat_template={name}: is no file and no template of TRL; {hint}"
        )
    return (shipped / f"{name}.jinja").read_text("utf-8")

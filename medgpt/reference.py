"""Generate the configuration reference from the models in medgpt/config/.

`python -m medgpt.reference` prints it as Markdown; with a file name it replaces the part of that
file between the two markers.
"""

import datetime
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

from medgpt.config.base import absolute_model_path, absolute_path, absolute_run_dir
from medgpt.config.dpo import DPOConfig
from medgpt.config.evaluation import EvalConfig
from medgpt.config.loading import find_model_class
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.reward_model import RewardModelConfig
from medgpt.config.stages import CorpusConfig, PipelineConfig, PretrainConfig, SFTConfig
from medgpt.config.tune import TuneStageConfig

BEGIN, END = "<!-- reference: begin -->\n", "<!-- reference: end -->"
STAGES: dict[str, type[BaseModel]] = {
    "pretrain": PretrainConfig,
    "sft": SFTConfig,
    "reward": RewardModelConfig,
    "dpo": DPOConfig,
    "ppo": PPOStageConfig,
    "tune": TuneStageConfig,
    "eval": EvalConfig,
    "corpus": CorpusConfig,
    "pipeline": PipelineConfig,
}
TYPE_NAMES = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "`true` or `false`",
    datetime.date: "date",
}
NAMES_BY_CHECK = {  # kinds of text, by the function that checks it
    absolute_path: "path or URI",
    absolute_model_path: "path, URI or hub id",
    absolute_run_dir: "path or URI",
}
TABLE_HEADER = "| key | type | default | meaning |\n|---|---|---|---|\n"


def reference() -> str:
    """Return one table for each section class, headed by all places where it is used."""
    stages: dict[type[BaseModel], dict[str, list[str]]] = {}
    for stage, cls in STAGES.items():
        for header, section_class in _sections(cls):
            stages.setdefault(section_class, {}).setdefault(header, []).append(stage)
    tables = []
    for section_class, headers in stages.items():
        rows = "".join(_row(name, field) for name, field in _plain_fields(section_class))
        note = (
            f"{_one_line(section_class.__doc__)}\n\n"
            if any(headers) and section_class.__doc__
            else ""
        )
        tables.append(f"{_title(headers)}\n\n{note}{TABLE_HEADER}{rows}")
    return "\n".join(tables)


def _title(headers: dict[str, list[str]]) -> str:
    """Return the headers of a section, grouped by the stages that use them."""
    places: dict[str, list[str]] = {}
    for header, users in headers.items():
        where = "all stages" if len(users) == len(STAGES) else ", ".join(users)
        places.setdefault(where, []).append(header)
    return "; ".join(
        "**"
        + ", ".join(f"`{header}`" if header else "Keys of the file itself" for header in shown)
        + f"** ({where})"
        for where, shown in places.items()
    )


def replace_block(text: str) -> str:
    """Return `text` with the reference between the two markers."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + reference() + "\n" + END + rest.split(END)[1]


def _sections(
    cls: type[BaseModel], path: tuple[str, ...] = ()
) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield (TOML header, model) of all sections, outer before inner."""
    if any(True for _ in _plain_fields(cls)) and not path:
        yield "", cls
    for name, field in cls.model_fields.items():
        section = find_model_class(field.annotation)
        if section is None:
            continue
        inner = (*path, name)
        listed = get_origin(_without_none(field.annotation)) is tuple
        header = ".".join(inner)
        yield (f"[[{header}]]" if listed else f"[{header}]"), section
        yield from _sections(section, inner)


def _plain_fields(cls: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """Yield the fields that hold values, not sections."""
    for name, field in cls.model_fields.items():
        if find_model_class(field.annotation) is None:
            yield name, field


def _row(name: str, field: FieldInfo) -> str:
    """Return the table row of a field."""
    if field.is_required():
        default = "required"
    elif field.default is None:
        default = "unset"
    else:
        default = f"`{json.dumps(field.default, ensure_ascii=False, default=str)}`"
    cells = (f"`{name}`", _type_in_words(field.annotation, tuple(field.metadata)), default)
    return f"| {' | '.join(_one_line(cell) for cell in cells)} | {_one_line(field.description)} |\n"


def _one_line(text: str | None) -> str:
    """Return `text` on one line, escaped for a table."""
    return re.sub(r"\s+", " ", text or "").strip().replace("|", "\\|")


def _type_in_words(annotation: Any, rules: tuple[Any, ...] = ()) -> str:
    """Describe the values that a field accepts."""
    annotation = _without_none(annotation)
    inner = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _type_in_words(inner[0], (*inner[1:], *rules))
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in inner)
    if get_origin(annotation) is tuple:
        items = _type_in_words(inner[0])
        count = "list of" if inner[-1] is ... else f"list of {len(inner)}:"
        return f"{count} {items}{_bounds_in_words(rules)}"
    if get_origin(annotation) is dict:
        return f"table of {_type_in_words(inner[1])}"
    if inner:
        return " or ".join(_type_in_words(choice) for choice in inner)
    checks = [rule.func for rule in rules if isinstance(rule, AfterValidator)]
    words = next(
        (NAMES_BY_CHECK[check] for check in checks if check in NAMES_BY_CHECK),
        TYPE_NAMES[annotation],
    )
    return words + _bounds_in_words(rules)


def _bounds_in_words(rules: tuple[Any, ...]) -> str:
    """Describe the limits of a number or a list, with a leading comma."""
    signs = {Gt: ">", Ge: "≥", Lt: "<", Le: "≤"}
    bounds = [f"{signs[type(rule)]} {astuple(rule)[0]}" for rule in rules if type(rule) in signs]
    if any(isinstance(rule, Len) and rule.min_length for rule in rules):
        bounds.append("not empty")
    return f", {', '.join(bounds)}" if bounds else ""


def _without_none(annotation: Any) -> Any:
    """Return X of `X | None`."""
    choices = [a for a in get_args(annotation) if a is not NoneType]
    return choices[0] if NoneType in get_args(annotation) and len(choices) == 1 else annotation


if __name__ == "__main__":
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
        path.write_text(replace_block(path.read_text("utf-8")), "utf-8")
    else:
        print(reference())

"""The configuration reference, from the models in config/.

`python -m medgpt.reference` prints it as Markdown; with a file name it replaces the part of that
file between the two marks.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

from medgpt.config.base import absolute, absolute_model, stable_run_dir
from medgpt.config.dpo import DPOConfig
from medgpt.config.evaluation import EvalConfig
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.reward_model import RewardConfig
from medgpt.config.stages import CorpusConfig, PipelineConfig, PretrainConfig, SFTConfig
from medgpt.config.tune import TuneStageConfig

BEGIN, END = "<!-- reference: begin -->\n", "<!-- reference: end -->"
STAGES: dict[str, type[BaseModel]] = {
    "pretrain": PretrainConfig,
    "sft": SFTConfig,
    "reward": RewardConfig,
    "dpo": DPOConfig,
    "ppo": PPOStageConfig,
    "tune": TuneStageConfig,
    "eval": EvalConfig,
    "corpus": CorpusConfig,
    "pipeline": PipelineConfig,
}
PLAIN = {str: "text", int: "integer", float: "number", bool: "`true` or `false`"}
CHECKED = {  # text that is more than text, by the function that checks it
    absolute: "path or URI",
    absolute_model: "path, URI or hub id",
    stable_run_dir: "path or URI",
}
HEAD = "| key | type | default | meaning |\n|---|---|---|---|\n"


def reference() -> str:
    """One table for each kind of section, with all places where it stands."""
    stages: dict[type[BaseModel], dict[str, list[str]]] = {}
    for stage, cls in STAGES.items():
        for header, section in _sections(cls):
            stages.setdefault(section, {}).setdefault(header, []).append(stage)
    tables = []
    for section, headers in stages.items():
        rows = "".join(_row(name, field) for name, field in _keys(section))
        note = f"{_text(section.__doc__)}\n\n" if any(headers) and section.__doc__ else ""
        tables.append(f"{_title(headers)}\n\n{note}{HEAD}{rows}")
    return "\n".join(tables)


def _title(headers: dict[str, list[str]]) -> str:
    """The headers of a section, those of the same stages together."""
    places: dict[str, list[str]] = {}
    for header, users in headers.items():
        where = "all stages" if len(users) == len(STAGES) else ", ".join(users)
        places.setdefault(where, []).append(header)
    return "; ".join(
        "**"
        + ", ".join(f"`{header}`" if header else "Keys of the file itself" for header in found)
        + f"** ({where})"
        for where, found in places.items()
    )


def replace_block(text: str) -> str:
    """`text` with the reference between the two marks."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + reference() + "\n" + END + rest.split(END)[1]


def _sections(
    cls: type[BaseModel], path: tuple[str, ...] = ()
) -> Iterator[tuple[str, type[BaseModel]]]:
    """TOML header and model, the outer before the inner, without those that have no own keys."""
    if any(True for _ in _keys(cls)) and not path:
        yield "", cls
    for name, field in cls.model_fields.items():
        section = _model_in(field.annotation)
        if section is None:
            continue
        inner = (*path, name)
        listed = get_origin(_without_none(field.annotation)) is tuple
        header = ".".join(inner)
        yield (f"[[{header}]]" if listed else f"[{header}]"), section
        yield from _sections(section, inner)


def _keys(cls: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """Fields that hold values, not sections."""
    for name, field in cls.model_fields.items():
        if _model_in(field.annotation) is None:
            yield name, field


def _row(name: str, field: FieldInfo) -> str:
    if field.is_required():
        default = "required"
    elif field.default is None:
        default = "unset"
    else:
        default = f"`{json.dumps(field.default, ensure_ascii=False)}`"
    cells = (f"`{name}`", _type(field.annotation, tuple(field.metadata)), default)
    return f"| {' | '.join(_text(cell) for cell in cells)} | {_text(field.description)} |\n"


def _text(text: str | None) -> str:
    """On one line, safe inside a table."""
    return re.sub(r"\s+", " ", text or "").strip().replace("|", "\\|")


def _type(annotation: Any, rules: tuple[Any, ...] = ()) -> str:
    """What may be written, in words."""
    annotation = _without_none(annotation)
    inner = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _type(inner[0], (*inner[1:], *rules))
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in inner)
    if get_origin(annotation) is tuple:
        items = _type(inner[0])
        count = "list of" if inner[-1] is ... else f"list of {len(inner)}:"
        return f"{count} {items}{_bounds(rules)}"
    if get_origin(annotation) is dict:
        return f"table of {_type(inner[1])}"
    if inner:
        return " or ".join(_type(choice) for choice in inner)
    checks = [rule.func for rule in rules if isinstance(rule, AfterValidator)]
    words = next((CHECKED[check] for check in checks if check in CHECKED), PLAIN[annotation])
    return words + _bounds(rules)


def _bounds(rules: tuple[Any, ...]) -> str:
    signs = {Gt: (">", "gt"), Ge: ("≥", "ge"), Lt: ("<", "lt"), Le: ("≤", "le")}
    found = [f"{signs[type(r)][0]} {_bound(r)}" for r in rules if type(r) in signs]
    if any(isinstance(rule, Len) and rule.min_length for rule in rules):
        found.append("not empty")
    return f", {', '.join(found)}" if found else ""


def _bound(rule: Gt | Ge | Lt | Le) -> Any:
    match rule:
        case Gt():
            return rule.gt
        case Ge():
            return rule.ge
        case Lt():
            return rule.lt
        case Le():
            return rule.le


def _without_none(annotation: Any) -> Any:
    """X of `X | None`."""
    choices = [a for a in get_args(annotation) if a is not NoneType]
    return choices[0] if NoneType in get_args(annotation) and len(choices) == 1 else annotation


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The section inside `X`, `X | None`, `tuple[X, ...]` or `Annotated[...]` of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for a in get_args(annotation) if (found := _model_in(a))), None)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        path = Path(sys.argv[1])
        path.write_text(replace_block(path.read_text("utf-8")), "utf-8")
    else:
        print(reference())

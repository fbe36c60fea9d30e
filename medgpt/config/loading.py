"""Load a TOML file and overrides into a checked config, with errors that name the remedy."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from medgpt.config.base import ConfigError, did_you_mean

ConfigT = TypeVar("ConfigT", bound=BaseModel)
MAX_VALUE_CHARS = 80  # of a wrong value that an error shows
RULES_BY_ERROR_TYPE = {  # for TOML, where the messages of pydantic name Python types
    "tuple_type": 'must be a list, as ["..."]',
    "too_short": "must not be empty",
    "model_type": "must be a section of keys",
}
RENAMED_KEYS = {  # key of version 0.1.0: its name now
    "licence": "license",
    "mark": "metric",
    "normalise_on": "normalize_on",
    "normalise_prompts": "normalize_prompts",
    "normalise_scores": "normalize_scores",
    "part": "hash_range",
}


def load(cls: type[ConfigT], path: Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read `path` into `cls`. Overrides are TOML assignments: `train.epochs=2`.

    Raises:
        ConfigError: names every wrong key with its value, the rule and the remedy.
    """
    return validate(cls, read_tree(path, overrides))


def read_tree(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the file with the overrides, not validated. Raises ConfigError like `load`."""
    try:
        tree = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError("no such file; configs/ has one for each stage") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"is not a TOML file: {error}") from None
    for text in overrides:
        _merge(tree, _parse_override(text))
    return tree


def validate(cls: type[ConfigT], tree: dict[str, Any]) -> ConfigT:
    """Validate `tree` as a `cls`. Raises ConfigError like `load`."""
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        problems = error.errors()
        unknown = [p["loc"] for p in problems if p["type"] == "extra_forbidden"]
        renamed = [(*key[:-1], RENAMED_KEYS.get(str(key[-1]))) for key in unknown]  # not missing
        shown = [
            p
            for p in problems
            if p["loc"] not in renamed and not any(_is_inside(q["loc"], p["loc"]) for q in problems)
        ]
        raise ConfigError("; ".join(_explain(cls, problem) for problem in shown)) from None


def with_values(cls: type[ConfigT], config: ConfigT, values: Mapping[str, Any]) -> ConfigT:
    """Return `config` with new values of some keys, `{"ppo.epochs": 2}`, validated again."""
    tree = config.model_dump(mode="json", exclude_none=True)
    for key, value in values.items():
        branch: Any = value
        for name in reversed(key.split(".")):
            branch = {name: branch}
        _merge(tree, branch)
    return validate(cls, tree)


def _parse_override(text: str) -> dict[str, Any]:
    for attempt in (text, text.replace("=", '="', 1) + '"'):  # a bare word is a string
        try:
            return tomllib.loads(attempt)
        except tomllib.TOMLDecodeError:
            continue
    raise ConfigError(f"cannot parse override {text!r}; write it as section.key=value")


def _merge(tree: dict[str, Any], update: dict[str, Any]) -> None:
    """Update `tree` in place; `sources.0.name=x` changes an item of a list."""
    for name, value in update.items():
        current = tree.get(name)
        if isinstance(current, list) and isinstance(value, dict) and all(map(str.isdigit, value)):
            items = {str(i): item for i, item in enumerate(current)}
            _merge(items, value)
            tree[name] = list(items.values())
        elif isinstance(current, dict) and isinstance(value, dict):
            _merge(current, value)
        else:
            tree[name] = value


def _is_inside(key: tuple[int | str, ...], other: tuple[int | str, ...]) -> bool:
    """Whether `key` lies in the section `other`, whose error then only repeats that of `key`."""
    return len(key) > len(other) and key[: len(other)] == other


def _explain(cls: type[BaseModel], problem: Any) -> str:
    """Describe an error of pydantic as `key=value: rule` or `unknown key; did you mean ...?`."""
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path)
    if problem["type"] == "missing":
        return f"missing key {key}"
    if problem["type"] != "extra_forbidden":
        value: object = problem["input"]
        shown = "" if isinstance(value, (dict, BaseModel)) else f"={_shorten(value)}"
        rule: str = RULES_BY_ERROR_TYPE.get(problem["type"]) or problem["msg"].removeprefix(
            "Value error, "
        )
        return f"{key}{shown}: {rule}" if key or shown else rule
    known = _section_class(cls, path[:-1]).model_fields
    if (new_name := RENAMED_KEYS.get(path[-1])) in known:
        return f"unknown key {key}; its name is now {'.'.join([*path[:-1], new_name])}"
    hint = did_you_mean(path[-1], known, prefix=key.removesuffix(path[-1]))
    return f"unknown key {key}; {hint}"


def _shorten(value: object) -> str:
    text = re.sub(r"(://[^/:]*:)[^/]*@", r"\1***@", repr(value))  # hide a password
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[:MAX_VALUE_CHARS]}..."


def _section_class(cls: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    """Return the model of the section at `path` below `cls`."""
    for name in path:
        if name in cls.model_fields:  # else an index of a list or a key of a table
            cls = find_model_class(cls.model_fields[name].annotation)
    return cls


def find_model_class(annotation: Any) -> Any:
    """Return the pydantic model inside `X | None`, `tuple[X, ...]`, `dict[str, X]` or `Annotated[X,
    ...]`, or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((cls for inner in get_args(annotation) if (cls := find_model_class(inner))), None)

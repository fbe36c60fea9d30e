"""Base class, checked types and the error class of all configuration sections."""

import difflib
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Lt
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, StringConstraints

Count = Annotated[int, Gt(0)]
Fraction = Annotated[float, Ge(0), Lt(1)]
Name = Annotated[str, StringConstraints(pattern=r"^[\w.-]+$")]


class ConfigError(ValueError):
    """The configuration or the data is wrong, and the user can fix it."""


class ModelError(ConfigError):
    """A model cannot be used. `key` is the config key that names it."""

    def __init__(self, name: str | None, problem: str) -> None:
        super().__init__(name, problem)
        self.name, self.problem, self.key = name, problem, "model.name"

    def __str__(self) -> str:
        return f"{self.key}={self.name}: {self.problem}"


def absolute_path(path: str) -> str:
    """Return `path` as an absolute path; a URI stays as it is."""
    if re.search(r"://[^/]*:[^/]*@", path):
        # it would be copied to manifests and logs
        raise ValueError("a URI must not contain a password; set it in the environment")
    return path if "://" in path else str(Path(path).expanduser().absolute())


def absolute_model_path(name: str) -> str:
    """Make the path of a model absolute; `owner/name` is a hub id unless such a folder exists."""
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()
    return absolute_path(name) if is_path else name


def absolute_run_dir(path: str) -> str:
    """Return an absolute run directory; a job would lose a relative one with its cached copy."""
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if submitted and "://" not in path and not Path(path).expanduser().is_absolute():
        raise ValueError(
            "a submitted job needs an absolute path or URI, its working directory is a cached copy"
        )
    return absolute_path(path)


def absolute_template_path(name: str) -> str:
    """Make the path of a chat template absolute; a name without .jinja is one of TRL's."""
    return str(Path(name).expanduser().absolute()) if name.endswith(".jinja") else name


def parse_worker_counts(value: object) -> int | tuple[int, int]:
    """Return a number of workers, or the fewest and the most."""
    counts = value if isinstance(value, list | tuple) else (value, value)
    numbers = [count for count in counts if type(count) is int and count > 0]  # no bools
    if len(counts) != 2 or len(numbers) != 2 or numbers[0] > numbers[1]:
        raise ValueError("must be an integer > 0, or two as [fewest, most]")
    return (numbers[0], numbers[1]) if isinstance(value, list | tuple) else numbers[0]


def did_you_mean(
    name: str, known: Collection[str], *, prefix: str = "", cutoff: float = 0.6
) -> str:
    """Return a hint for an error: the known name nearest to `name`, or all known names."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    if nearest:
        return f"did you mean {prefix}{nearest[0]}?"
    return f"known: {', '.join(known) or 'none'}"


def multiples_near(number: int, divisor: int) -> str:
    """Return the multiples of `divisor` around `number`, as `8 or 10`, for an error."""
    below = number // divisor * divisor
    return " or ".join(str(multiple) for multiple in (below, below + divisor) if multiple)


DataPath = Annotated[str, AfterValidator(absolute_path)]
DenyPath = Annotated[
    str, AfterValidator(lambda name: name if name == "default" else absolute_path(name))
]
ModelPath = Annotated[str, AfterValidator(absolute_model_path)]
TemplatePath = Annotated[str, AfterValidator(absolute_template_path)]
RunDir = Annotated[str, AfterValidator(absolute_run_dir)]
Workers = Annotated[int | tuple[int, int], BeforeValidator(parse_worker_counts)]


class Config(BaseModel):
    """Base of every section: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

"""User-defined reward functions by import path. A failing one gives its samples no value."""

import importlib
import inspect
import logging
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

from medgpt.config.base import ConfigError
from medgpt.config.ppo_rewards import RewardFunctionConfig
from medgpt.rlhf.rewards.reward_sample import RewardSample

log = logging.getLogger(__name__)


class RewardFunction:
    """A reward function whose failures become None: they never stop a run and never count as 0."""

    def __init__(self, config: RewardFunctionConfig) -> None:
        """Raises ConfigError if the function cannot be imported or does not take one list."""
        self.name = config.name
        self._function = _import_function(config)

    def __call__(self, samples: Sequence[RewardSample]) -> list[float | None]:
        """Return a finite number or None per sample. Logs name the type of an error, not its text,
        which may quote a patient."""
        try:
            values = list(self._function(list(samples)))
        except Exception as error:  # a failing function masks these samples only
            log.warning("reward function %s raised %s", self.name, type(error).__name__)
            return [None] * len(samples)
        if len(values) != len(samples):
            log.warning(
                "reward function %s returned %d values for %d samples",
                *(self.name, len(values), len(samples)),
            )
            return [None] * len(samples)
        return [finite_or_none(value) for value in values]


def finite_or_none(value: Any) -> float | None:
    """Return `value` as a float; None if it is not a finite number."""
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def _import_function(config: RewardFunctionConfig) -> Callable[[list[RewardSample]], Any]:
    module, _, name = config.path.partition(":")
    key = f"reward.functions {config.name}: path={config.path}"
    try:
        function = vars(importlib.import_module(module)).get(name)
    except Exception as error:  # a module may fail with anything while it is imported
        raise ConfigError(
            f"{key}: importing {module} failed with {type(error).__name__}: {error}; install it on "
            "every node or correct the path"
        ) from None
    if not callable(function):
        raise ConfigError(f"{key}: {module} has no function {name}; write it as module:function")
    _check_signature(key, function)
    return function


def _check_signature(key: str, function: Callable[..., Any]) -> None:
    """Raises ConfigError unless the function can be called with one list."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        raise ConfigError(f"{key}: its parameters cannot be read; wrap it in a function") from None
    try:
        signature.bind([])
    except TypeError:
        raise ConfigError(
            f"{key}: it takes ({', '.join(signature.parameters)}); it must take one argument, the "
            "list of answers, and return as many numbers"
        ) from None

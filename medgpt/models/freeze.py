"""Weights of the model that do not train."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from medgpt.config.base import ConfigError, did_you_mean


def freeze_weights(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the parameters whose names match a pattern; raises the errors of `frozen_names`."""
    if patterns:
        frozen = frozen_names([name for name, _ in model.named_parameters()], patterns)
        for name, param in model.named_parameters():
            if name in frozen:
                param.requires_grad_(False)


def frozen_names(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """Return the names that match a pattern.

    Raises ConfigError if a pattern matches none, or together they match all.
    """
    names, frozen = list(names), set[str]()
    for pattern in patterns:
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            raise ConfigError(
                f"model.freeze={pattern}: no weight of the model has such a name; "
                f"{did_you_mean(pattern, names[:10])}"
            )
        frozen |= matches
    if len(frozen) == len(names):
        raise ConfigError(
            f"model.freeze={list(patterns)} leaves no weight to train; leave some out"
        )
    return frozen

"""Collectives of Python values over all ranks."""

from typing import Any

import torch.distributed as dist

from medgpt.config.base import ConfigError


def broadcast(value: Any) -> Any:
    """Return the `value` of rank 0 on all ranks."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def all_gather(value: Any) -> list[Any]:
    """Return the values of all ranks on all ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_gather_items(items: list[Any]) -> list[Any]:
    """Return the concatenated lists of all ranks on all ranks."""
    return [item for part in all_gather(items) for item in part]


def raise_on_all_ranks(errors: list[ConfigError]) -> None:
    """Raise on all ranks the first error of any rank. Collective."""
    for error in all_gather_items(errors):
        raise error

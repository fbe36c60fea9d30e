"""Finds out how a causal model may read several rows at once without changing them.

A small copy of the model reads two texts together, and each alone in one plain forward. State that
left padding or a dropped row disturbs, or a cache that the model does not know, shows in the
difference.
"""

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from medgpt.models.layout import random_texts
from medgpt.models.small_model import small_model

log = logging.getLogger(__name__)

TOLERANCE = 1e-3  # nats
ReadingMode = Literal["batched", "single", "plain"]
"""batched: rows share forwards; single: one row at a time, with a cache; plain: without one."""

Row = tuple[list[int], list[float]]
"""Ids of a row and the log-probabilities of the last of them."""
Logprobs = Callable[[PreTrainedModel, ReadingMode, list[list[int]]], list[Row]]
"""Reads prompts; returns their rows, with or without a response."""


# not lru_cache, which would keep the weights of the models it is called with
_known_modes: dict[tuple[type, str, tuple[ReadingMode, ...], Logprobs], ReadingMode] = {}


def find_mode(
    model: PreTrainedModel, modes: tuple[ReadingMode, ...], read: Logprobs
) -> ReadingMode:
    """Return the first of `modes` in which `read` is exact; the last one needs no check."""
    key = (type(model), model.config.to_json_string(use_diff=False), modes, read)
    if key not in _known_modes:
        _known_modes[key] = _find_mode(model, modes, read)
    return _known_modes[key]


def _find_mode(model: Any, modes: tuple[ReadingMode, ...], read: Logprobs) -> ReadingMode:
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        texts = random_texts(model.config)
        options = {"attn_implementation": model.config._attn_implementation}
        try:
            small = small_model(
                model.config, "clm", texts[-1][None], model_class=type(model), **options
            )
        except Exception as error:  # no small copy can be built
            _warn(model, modes[-1], f"no small copy could be tried: {type(error).__name__}")
            return modes[-1]
        prompts = [texts[0][:5].tolist(), texts[1].tolist()]
        reason = ""
        for mode in modes[:-1]:
            try:
                rows = read(small, mode, prompts)
            except Exception as error:  # the model's code may raise anything
                reason = f"{mode} reading raised {type(error).__name__}"
                continue
            if all(_is_exact(small, *row) for row in rows):
                break
            reason = f"{mode} reading is not exact"
        else:
            mode = modes[-1]
    if mode != modes[0]:
        _warn(model, mode, reason)
    return mode


def _warn(model: PreTrainedModel, mode: ReadingMode, reason: str) -> None:
    log.warning("%s reads rows in the slower mode %r: %s", type(model).__name__, mode, reason)


def _is_exact(model: Any, ids: list[int], logprobs: list[float]) -> bool:
    """Return whether `logprobs` are those of the last tokens of `ids` in a plain forward."""
    expected = plain_logprobs(model, ids)[-len(logprobs) :]
    return torch.allclose(expected, torch.tensor(logprobs), rtol=0, atol=TOLERANCE)


def plain_logprobs(model: Any, ids: list[int]) -> Tensor:
    """Return the log-probabilities (L - 1,) of all tokens but the first, from a plain forward."""
    row = torch.tensor([ids], device=model.device)
    logprobs = model(row[:, :-1]).logits[0].float().log_softmax(-1)
    return logprobs.gather(1, row[0, 1:, None])[:, 0]

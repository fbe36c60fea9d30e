"""Reads the marks that say whether a turn is learned: of ms-swift, axolotl, OpenAI and others."""

from collections.abc import Mapping
from typing import Any

from medgpt.data.sources.records import Role
from medgpt.data.sources.row_values import MalformedRow, json_type

LOSS_KEYS = (
    *("loss", "weight", "train", "training", "learn", "trainable"),
    *("loss_weight", "loss_scale", "loss_mask"),
)
FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def read_loss_flag(turn: Mapping[str, Any], role: Role, location: str) -> bool:
    """Return whether an answer is to be learned. Only answers are, so other turns return True.

    Raises MalformedRow if a mark is neither true nor false, if two contradict each other, or if
    another turn than an answer is to be learned.
    """
    marks = {
        key: _read_mark(turn[key], f"{location}, {key}")
        for key in LOSS_KEYS
        if turn.get(key) is not None
    }
    if len(set(marks.values())) > 1:
        raise MalformedRow(f"{location}: {' and '.join(marks)} contradict each other")
    learn = all(marks.values())
    if role == "assistant":
        return learn
    if marks and learn:
        raise MalformedRow(
            f"{location}: {next(iter(marks))} asks to learn a turn of the {role}, but only the "
            "assistant's turns are learned"
        )
    return True


def _read_mark(value: object, location: str) -> bool:
    if isinstance(value, (str, int, float)) and (flag := FLAGS.get(str(value).lower())) is not None:
        return flag
    raise MalformedRow(
        f"{location} is {json_type(value)}, must be 0 or 1, or true or false: a turn is learned "
        "whole or not at all"
    )

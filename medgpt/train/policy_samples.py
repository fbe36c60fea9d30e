"""What the model that a reward model starts from would say itself."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from medgpt.config.reward_model import RewardConfig
from medgpt.data.loader.collate import piece_seed
from medgpt.data.loader.order import VALIDATION
from medgpt.data.loader.packed_row import Row
from medgpt.data.tokenized.chat import stop_ids
from medgpt.models.base import local_folder
from medgpt.models.decode import Generator
from medgpt.models.generate import load_for_generation

TEMPERATURE = 1.0  # its own distribution


def own_answers(
    config: RewardConfig, tokenizer: Any, device: torch.device, rows: Sequence[Row]
) -> list[Row]:
    """The rows' prompts, each with one answer that model.name gives to it.

    Every worker answers its own rows with a whole model, beside what it trains.
    """
    if not rows:
        return []
    assert config.model.name is not None
    model, _ = load_for_generation(str(local_folder(config.model.name)), device)
    generator, prompts = Generator(model), [_prompt(row) for row in rows]
    room = generator.positions - max(map(len, prompts))
    seeds = [piece_seed(config.run.seed, VALIDATION, row.sample_ids[0], 0) for row in rows]
    with torch.no_grad():
        replies = generator.generate(
            prompts,
            seeds,
            max_new_tokens=min(config.objective.max_new_tokens, room),
            temperature=TEMPERATURE,
            ends=stop_ids(tokenizer),
        )
    return [
        _answered(row, prompt, reply.ids)
        for row, prompt, reply in zip(rows, prompts, replies, strict=True)
    ]


def _prompt(row: Row) -> list[int]:
    """What comes before the first answer."""
    return row.input_ids[: int(row.targets.argmax())].tolist()


def _answered(row: Row, prompt: list[int], reply: list[int]) -> Row:
    ids = np.array([*prompt, *reply], np.int32)
    return replace(
        row,
        input_ids=ids,
        targets=np.arange(len(ids)) >= len(prompt),
        lengths=np.array([len(ids)]),
        pieces=np.array([len(ids)], np.int32),
        grades=np.zeros(1, np.float32),
    )

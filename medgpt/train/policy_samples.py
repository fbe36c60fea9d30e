"""Sample answers from the policy that a reward model starts from."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from medgpt.config.reward_model import RewardModelConfig
from medgpt.data.loader.collate import sequence_seed
from medgpt.data.loader.epoch_order import VALIDATION
from medgpt.data.loader.packed_row import PackedRow
from medgpt.data.tokenized.chat_template import stop_token_ids
from medgpt.models.decode import TokenGenerator
from medgpt.models.generate import load_for_generation
from medgpt.models.model_files import resolve_model_folder

TEMPERATURE = 1.0  # the policy's own distribution


def sample_policy_answers(
    config: RewardModelConfig, tokenizer: Any, device: torch.device, rows: Sequence[PackedRow]
) -> list[PackedRow]:
    """Return the rows' prompts, each with one answer sampled from a complete copy of model.name."""
    if not rows:
        return []
    assert config.model.name is not None
    model, _ = load_for_generation(
        str(resolve_model_folder(config.model.name)),
        device,
        trust_remote_code=config.model.trust_remote_code,
    )
    generator, prompts = TokenGenerator(model), [_prompt_ids(row) for row in rows]
    max_answer_tokens = generator.max_positions - max(map(len, prompts))
    seeds = [sequence_seed(config.run.seed, VALIDATION, row.sample_ids[0], 0) for row in rows]
    with torch.no_grad():
        replies = generator.generate(
            prompts,
            seeds,
            max_new_tokens=min(config.objective.max_new_tokens, max_answer_tokens),
            temperature=TEMPERATURE,
            stop_token_ids=stop_token_ids(tokenizer),
        )
    return [
        _row_with_answer(row, prompt, reply.ids)
        for row, prompt, reply in zip(rows, prompts, replies, strict=True)
    ]


def _prompt_ids(row: PackedRow) -> list[int]:
    """Return the ids before the first answer."""
    return row.input_ids[: int(row.targets.argmax())].tolist()


def _row_with_answer(row: PackedRow, prompt_ids: list[int], answer_ids: list[int]) -> PackedRow:
    ids = np.array([*prompt_ids, *answer_ids], np.int32)
    return replace(
        row,
        input_ids=ids,
        targets=np.arange(len(ids)) >= len(prompt_ids),
        lengths=np.array([len(ids)]),
        sequence_lengths=np.array([len(ids)], np.int32),
        grades=np.zeros(1, np.float32),
    )

"""Small configs and batches for the tests of rlhf/."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medgpt.config.loading import load
from medgpt.config.model import LoraConfig, ModelConfig
from medgpt.config.ppo import PPOStageConfig
from medgpt.data.loader.packed_row import PackedRow
from medgpt.models.lora import apply_lora
from medgpt.models.model_files import VALUE_HEAD
from medgpt.models.tokenizer import load_tokenizer
from medgpt.models.value_model import RewardModelInfo, build_value_model
from medgpt.rlhf.rollout_batch import (
    Logprobs,
    Prompts,
    PtxBatch,
    Ragged,
    Scores,
    Sequences,
    Values,
)

VOCAB = 200
PTX = (
    "ptx={coef=0.5,batch_size=3,data={max_length=24,sources=[{name='p',paths=['p'],license='-'}]}}"
)
CONFIG = """
[run]
dir = "{folder}/run"
[model]
name = "{base}"
[data]
max_length = 32
[[data.sources]]
name = "s"
paths = ["{base}"]
license = "none"
[ppo]
rollout_batch_size = 12
global_batch_size = 4
epochs = 2
micro_batch_tokens = 48
[reward]
score_weight = 0.0
[rollout]
max_new_tokens = 8
[optimizer]
learning_rate = 1e-3
[critic.optimizer]
learning_rate = 1e-3
[pools.actor.engine]
zero_stage = 0
[pools.critic.engine]
zero_stage = 0
"""


def ppo_config(folder: Path, base: Path, *overrides: str) -> PPOStageConfig:
    """Config of a run from the model in `base`: 12 prompts per iteration, 4 per step."""
    path = folder / f"ppo-{os.getpid()}.toml"  # ranks call this concurrently
    path.write_text(CONFIG.format(folder=folder, base=base), "utf-8")
    return load(PPOStageConfig, path, overrides)


def save_reward_model(base: Path, folder: Path, *, lora: bool = False, seed: int = 3) -> Path:
    """Save the base with a fresh value head, and optionally nonzero LoRA adapters."""
    model = build_value_model(ModelConfig(name=str(base)), seed=seed, dtype=torch.float32)
    if lora:
        model = apply_lora(model, LoraConfig(rank=2), head=VALUE_HEAD)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    load_tokenizer(str(base)).save_pretrained(folder)
    RewardModelInfo(mean=0.25, std=0.5, normalised_on="chosen answers", speech={}).write(folder)
    return folder


def prompts_of(rollouts: Sequences) -> Prompts:
    """Prompts of the sequences."""
    messages = ['[["user", "?"]]'] * len(rollouts)
    return Prompts(sample_ids=rollouts.sample_ids, ids=rollouts.prompts, messages=messages)


def with_empty_responses(rollouts: Sequences, *rows: int) -> Sequences:
    """The same batch with empty responses in these rows."""
    kept = np.ones(len(rollouts.logprobs), np.bool_)
    kept[rollouts.responses.positions(rows)] = False
    lengths = rollouts.responses.lengths.copy()
    lengths[list(rows)] = 0
    offsets = np.append(0, np.cumsum(lengths))
    responses = Ragged(rollouts.responses.values[kept], offsets)
    return replace(rollouts, responses=responses, logprobs=rollouts.logprobs[kept])


def sequences(num: int = 12, *, seed: int = 0, longest: int = 8) -> Sequences:
    """Random prompts of 3 to 15 tokens, responses of 1 to `longest`, and log-probabilities."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(5, VOCAB, n) for n in rng.integers(3, 16, num)]
    responses = [rng.integers(5, VOCAB, n) for n in rng.integers(1, longest + 1, num)]
    ragged = Ragged.from_rows(responses, np.int32)
    return Sequences(
        index=np.arange(num),
        sample_ids=[f"sample-{i}" for i in range(num)],
        prompts=Ragged.from_rows(prompts, np.int32),
        responses=ragged,
        logprobs=rng.normal(-3, 1, len(ragged.values)).astype(np.float32),
        finished=ragged.lengths < longest,
        weight_version=0,
    )


def share(rollouts: Sequences, index: Any) -> Sequences:
    """The share of one worker that sampled these rows."""
    index = np.asarray(index)
    return Sequences(
        index=index,
        sample_ids=[rollouts.sample_ids[i] for i in index],
        prompts=rollouts.prompts.take(index),
        responses=rollouts.responses.take(index),
        logprobs=rollouts.logprobs[rollouts.responses.positions(index)],
        finished=rollouts.finished[index],
        weight_version=rollouts.weight_version,
    )


def scores(rollouts: Sequences, totals: Any = None) -> Scores:
    """Scores, by default random."""
    rewards = np.random.default_rng(1).normal(size=len(rollouts)) if totals is None else totals
    made_of: Any = None  # only the driver reads it
    return Scores(index=rollouts.index, totals=np.asarray(rewards, np.float32), rewards=made_of)


def values(rollouts: Sequences, flat: Any = None, bootstrap: Any = None) -> Values:
    """Values, by default random."""
    rng = np.random.default_rng(2)
    flat = rng.normal(size=len(rollouts.responses.values)) if flat is None else flat
    bootstrap = rng.normal(size=len(rollouts)) if bootstrap is None else bootstrap
    return Values(
        index=rollouts.index,
        values=np.asarray(flat, np.float32),
        bootstrap=np.asarray(bootstrap, np.float32),
    )


def logprobs(rollouts: Sequences, flat: Any = None) -> Logprobs:
    """Log-probabilities, by default those of sampling."""
    flat = rollouts.logprobs if flat is None else flat
    return Logprobs(index=rollouts.index, values=np.asarray(flat, np.float32), entropy=0.0)


def ptx_batch(*sizes: int, seed: int = 0) -> PtxBatch:
    """Steps of `sizes` rows; each row packs two sequences whose second halves are targets."""
    rng = np.random.default_rng(seed)
    return PtxBatch(steps=[[_row(rng) for _ in range(size)] for size in sizes])


def _row(rng: np.random.Generator) -> PackedRow:
    lengths = rng.integers(4, 13, 2)
    targets = [np.arange(length) >= length // 2 for length in lengths]
    return PackedRow(
        input_ids=rng.integers(5, VOCAB, lengths.sum()).astype(np.int32),
        targets=np.concatenate(targets),
        word_ids=None,
        lengths=lengths,
        sample_ids=["a", "b"],
        chunks=[0, 0],
        repeat=[0, 0],
    )

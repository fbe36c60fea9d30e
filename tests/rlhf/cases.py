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
from medgpt.data.loader.packed_row import Row
from medgpt.models.base import HEAD
from medgpt.models.lora import apply_lora
from medgpt.models.tokenizer import load_base
from medgpt.models.value_model import Score, build_value_model
from medgpt.rlhf.rollout_batch import (
    Lessons,
    Logprobs,
    Prompts,
    Ragged,
    Scores,
    Sequences,
    Values,
)

VOCAB = 200
PTX = (
    "ptx={coef=0.5,batch_size=3,data={max_length=24,sources=[{name='p',paths=['p'],licence='-'}]}}"
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
licence = "none"
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
    """A run from the model in `base`: 12 prompts an iteration, 4 a step."""
    path = folder / f"ppo-{os.getpid()}.toml"  # ranks call this at the same time
    path.write_text(CONFIG.format(folder=folder, base=base), "utf-8")
    return load(PPOStageConfig, path, overrides)


def save_reward_model(base: Path, folder: Path, *, lora: bool = False, seed: int = 3) -> Path:
    """A reward model in `folder`: the base with a fresh head, or adapters that are not at zero."""
    model = build_value_model(ModelConfig(name=str(base)), seed=seed, dtype=torch.float32)
    if lora:
        model = apply_lora(model, LoraConfig(rank=2), head=HEAD)
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    load_base(str(base)).save_pretrained(folder)
    Score(mean=0.25, std=0.5, normalised_on="chosen answers", speech={}).write(folder)
    return folder


def asked(whole: Sequences) -> Prompts:
    """The prompts of sequences."""
    messages = ['[["user", "?"]]'] * len(whole)
    return Prompts(sample_ids=whole.sample_ids, ids=whole.prompts, messages=messages)


def without_response(whole: Sequences, *rows: int) -> Sequences:
    """The same, but nothing was answered in these rows."""
    kept = np.ones(len(whole.logprobs), np.bool_)
    kept[whole.responses.places(rows)] = False
    lengths = whole.responses.lengths.copy()
    lengths[list(rows)] = 0
    offsets = np.append(0, np.cumsum(lengths))
    responses = Ragged(whole.responses.values[kept], offsets)
    return replace(whole, responses=responses, logprobs=whole.logprobs[kept])


def sequences(num: int = 12, *, seed: int = 0, longest: int = 8) -> Sequences:
    """Random prompts of 3 to 15 tokens and responses of 1 to `longest`, sampled by nobody."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(5, VOCAB, n) for n in rng.integers(3, 16, num)]
    responses = [rng.integers(5, VOCAB, n) for n in rng.integers(1, longest + 1, num)]
    ragged = Ragged.of(responses, np.int32)
    return Sequences(
        index=np.arange(num),
        sample_ids=[f"sample-{i}" for i in range(num)],
        prompts=Ragged.of(prompts, np.int32),
        responses=ragged,
        logprobs=rng.normal(-3, 1, len(ragged.values)).astype(np.float32),
        finished=ragged.lengths < longest,
        weight_version=0,
    )


def share(whole: Sequences, index: Any) -> Sequences:
    """What one worker would have sampled of `whole`."""
    index = np.asarray(index)
    return Sequences(
        index=index,
        sample_ids=[whole.sample_ids[i] for i in index],
        prompts=whole.prompts.take(index),
        responses=whole.responses.take(index),
        logprobs=whole.logprobs[whole.responses.places(index)],
        finished=whole.finished[index],
        weight_version=whole.weight_version,
    )


def scores(whole: Sequences, totals: Any = None) -> Scores:
    """By default random."""
    found = np.random.default_rng(1).normal(size=len(whole)) if totals is None else totals
    made_of: Any = None  # only the driver asks
    return Scores(index=whole.index, totals=np.asarray(found, np.float32), rewarded=made_of)


def values(whole: Sequences, flat: Any = None, after: Any = None) -> Values:
    """By default random."""
    rng = np.random.default_rng(2)
    flat = rng.normal(size=len(whole.responses.values)) if flat is None else flat
    after = rng.normal(size=len(whole)) if after is None else after
    return Values(
        index=whole.index,
        values=np.asarray(flat, np.float32),
        after=np.asarray(after, np.float32),
    )


def logprobs(whole: Sequences, of: Any, flat: Any = None) -> Logprobs:
    """By default those of the sampling."""
    flat = whole.logprobs if flat is None else flat
    return Logprobs(of=of, index=whole.index, values=np.asarray(flat, np.float32), entropy=0.0)


def lessons(*sizes: int, seed: int = 0) -> Lessons:
    """Steps of so many rows, each of two random pieces, of which the second half is learnt."""
    rng = np.random.default_rng(seed)
    return Lessons(steps=[[_row(rng) for _ in range(size)] for size in sizes])


def _row(rng: np.random.Generator) -> Row:
    lengths = rng.integers(4, 13, 2)
    learnt = [np.arange(length) >= length // 2 for length in lengths]
    return Row(
        input_ids=rng.integers(5, VOCAB, lengths.sum()).astype(np.int32),
        targets=np.concatenate(learnt),
        word_ids=None,
        lengths=lengths,
        sample_ids=["a", "b"],
        chunks=[0, 0],
        visits=[0, 0],
    )

"""What the roles that run a model over response tokens have in common."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from medgpt.config.base import ConfigError
from medgpt.config.pools import Precision, RoleConfig
from medgpt.config.ppo import PPOStageConfig
from medgpt.rlhf.batching import ForwardPass, RowIndices, forward_passes, mini_batches
from medgpt.rlhf.experience import Experience, RunningStats
from medgpt.rlhf.rollout_batch import Logprobs, Sequences

RATIO_TOLERANCE = 1e-4  # of the first step's ratios from 1, in fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateTask:
    """What actor and critic are told of an iteration."""

    iteration: int  # from 0
    weight_version: int  # that sampled the rollouts
    kl_coef: float
    score_stats: RunningStats
    update_actor: bool  # False while the critic warms up


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """What an update reports; the same on every rank."""

    metrics: dict[str, float]
    score_stats: RunningStats
    mean_kl: float  # nats per response, policy to reference
    sample_ids: list[str]  # of the sequences that counted


def role_device() -> torch.device:
    """The GPU that this worker was given, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def frozen_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Of a model that does not learn."""
    auto = "fp32" if device.type == "cpu" else "bf16"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[
        auto if precision == "auto" else precision
    ]


def initial_device(pool: RoleConfig) -> torch.device:
    """Where a model is made: not on a GPU that another role may be using."""
    return torch.device("cpu") if pool.offload else role_device()


def move_modules(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Take weights to `device`; memory that they leave on a GPU is free for other processes."""
    for module in modules:
        module.to(device)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def errors_for_key(key: str) -> Iterator[None]:
    """What is wrong with a model is told of the key that names it."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.name=", f"{key}=")) from None


def max_pass_tokens(config: PPOStageConfig) -> int:
    """Of a forward pass: the budget, or one sequence or row that is longer."""
    longest = config.data.max_length + config.rollout.max_new_tokens
    ptx_row = config.ptx.data.max_length if config.ptx else 0
    return max(config.ppo.micro_batch_tokens, longest, ptx_row)


def local_forward_passes(
    sequences: Sequences, rows: RowIndices, config: PPOStageConfig
) -> Iterator[ForwardPass]:
    """This rank's share of the passes over `rows`."""
    return forward_passes(
        sequences,
        rows,
        rank=dist.get_rank(),
        num_ranks=dist.get_world_size(),
        max_tokens=config.ppo.micro_batch_tokens,
    )


@torch.no_grad()
def response_logprobs(
    policy: Callable[..., Tensor],
    sequences: Sequences,
    config: PPOStageConfig,
    device: torch.device,
    *,
    model: Literal["actor", "reference"],
    temperature: float,
) -> Logprobs:
    """This rank's share of the log-probabilities, at the temperature of sampling."""
    index, values, entropy = [], [], torch.zeros((), device=device)
    for forward in local_forward_passes(sequences, np.arange(len(sequences)), config):
        terms = policy(
            forward.batch.to(device),
            temperature=temperature,
            with_entropy=model == "actor",
        )
        num_tokens = int(sequences.responses.lengths[forward.rows].sum())
        index.append(forward.rows)
        values.append(terms[0, :num_tokens])
        entropy += terms[1].sum()
    return Logprobs(
        model=model,
        index=np.concatenate(index),
        values=torch.cat(values).cpu().numpy(),
        entropy=float(entropy),
    )


def optimizer_step_rows(
    experience: Experience, config: PPOStageConfig, iteration: int
) -> Iterator[RowIndices]:
    """The sequences of each optimizer step; those that do not count are left out."""
    for epoch in range(config.ppo.epochs):
        for rows in mini_batches(
            len(experience.sequences),
            config.ppo.global_batch_size,
            seed=config.run.seed,
            iteration=iteration,
            epoch=epoch,
        ):
            yield rows[np.isin(rows, experience.valid_rows)]


def token_positions(sequences: Sequences, rows: RowIndices) -> Tensor:
    """(n,) where the response tokens of `rows` are among all."""
    return torch.from_numpy(sequences.responses.positions(rows))


def all_reduce(values: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduced over the ranks, in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values, op=op)
    return values

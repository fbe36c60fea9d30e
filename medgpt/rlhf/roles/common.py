"""Helpers shared by the roles: devices, forward passes, optimizer steps."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from medgpt.config.base import ModelError
from medgpt.config.pools import RoleConfig
from medgpt.config.ppo import PPOStageConfig
from medgpt.rlhf.batching import ForwardPass, RowIndices, forward_passes, mini_batches
from medgpt.rlhf.experience import Experience, RunningStats
from medgpt.rlhf.rollout_batch import Logprobs, Sequences

RATIO_TOLERANCE = 1e-4  # largest deviation of the first step's ratios from 1, in fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateTask:
    """Arguments of the actor's and critic's update of an iteration."""

    iteration: int  # from 0
    weight_version: int  # of the weights that sampled the rollouts
    kl_coef: float
    score_stats: RunningStats
    update_actor: bool  # False while the critic warms up


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """Result of the actor's update; the same on every rank."""

    metrics: dict[str, float]
    score_stats: RunningStats
    mean_kl: float  # nats per response, policy to reference
    sample_ids: list[str]  # of the sequences trained on


def role_device() -> torch.device:
    """Return the GPU of this worker, or the CPU without one."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def initial_device(pool: RoleConfig) -> torch.device:
    """Return the device to build a model on: the CPU if the GPU is shared with another role."""
    return torch.device("cpu") if pool.offload else role_device()


class FrozenRole:
    """Base of the roles without an optimizer, which can leave the device between calls. Not
    supported at ZeRO-3."""

    def modules(self) -> Iterable[nn.Module]:
        """Return the models that move."""
        raise NotImplementedError

    def offload(self) -> None:
        """Move the models to host memory."""
        self._move(torch.device("cpu"))

    def onload(self) -> None:
        self._move(role_device())

    def _move(self, device: torch.device) -> None:
        for module in self.modules():
            module.to(device)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for other processes


@contextmanager
def errors_for_key(key: str) -> Iterator[None]:
    """Make errors about a model name the config key that chose the model."""
    try:
        yield
    except ModelError as error:
        error.key = key
        raise


def max_pass_tokens(config: PPOStageConfig) -> int:
    """Return the most tokens of a forward pass: the budget, or a longer sequence or PPO-ptx row."""
    longest = config.data.max_length + config.rollout.max_new_tokens
    ptx_row = config.ptx.data.max_length if config.ptx else 0
    return max(config.ppo.micro_batch_tokens, longest, ptx_row)


def local_forward_passes(
    sequences: Sequences, rows: RowIndices, config: PPOStageConfig, *, padded: bool
) -> Iterator[ForwardPass]:
    """Yield this rank's forward passes over `rows` with a model that is padded or not."""
    return forward_passes(
        sequences,
        rows,
        rank=dist.get_rank(),
        num_ranks=dist.get_world_size(),
        max_tokens=config.ppo.micro_batch_tokens,
        padded=padded,
    )


@torch.no_grad()
def response_logprobs(
    policy: Callable[..., Tensor],
    sequences: Sequences,
    config: PPOStageConfig,
    device: torch.device,
    *,
    temperature: float,
    padded: bool,
    with_entropy: bool = False,
) -> Logprobs:
    """Return this rank's share of the log-probabilities at `temperature`."""
    index, values, entropy = [], [], torch.zeros((), device=device)
    rows = np.arange(len(sequences))
    for forward in local_forward_passes(sequences, rows, config, padded=padded):
        batch = forward.batch.to(device)
        terms = policy(batch, temperature=temperature, with_entropy=with_entropy)
        num_tokens = int(sequences.responses.lengths[forward.rows].sum())
        index.append(forward.rows)
        values.append(terms[0, :num_tokens])
        entropy += terms[1].sum()
    return Logprobs(
        index=np.concatenate(index), values=torch.cat(values).cpu().numpy(), entropy=float(entropy)
    )


def optimizer_step_rows(
    experience: Experience, config: PPOStageConfig, iteration: int
) -> Iterator[RowIndices]:
    """Yield the valid rows of each optimizer step."""
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
    """(n,) positions of the response tokens of `rows` in the (N,) tensors of the batch."""
    return torch.from_numpy(sequences.responses.positions(rows))


def all_reduce(values: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """Reduce `values` over the ranks, in place, and return it."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values, op=op)
    return values

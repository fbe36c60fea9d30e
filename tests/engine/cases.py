"""A tiny model with odd shapes and ragged data, trained by DeepSpeed and by plain torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from medgpt.config.train import EngineConfig, OptimizerConfig
from medgpt.engine import Engine
from medgpt.engine.export import gather_weights
from medgpt.engine.schedule import learning_rate

CPU = torch.device("cpu")
VOCAB = 7
WIDTH = 33_335
TOTAL_STEPS = 8
OPTIMIZER = OptimizerConfig(
    learning_rate=0.02, warmup_share=0.25, weight_decay=0.1, max_grad_norm=0.3
)


@dataclass(frozen=True)
class EngineSetup:
    zero_stage: int
    offload: bool = False
    precision: str = "fp32"

    def config(self) -> EngineConfig:
        values = {"zero_stage": self.zero_stage, "offload_optimizer": self.offload}
        return EngineConfig.model_validate(values | {"precision": self.precision})

    def net(self, seed: int = 0) -> "Net":
        return new_net(seed, WIDTH if self.precision == "fp32" else 9)  # bf16 is slow on a CPU


class Net(nn.Module):
    """Embedding, matrices, vectors, a tied output layer; odd sizes do not divide by two ranks.

    The wide layers are above the 100,000 elements below which ZeRO-3 keeps weights whole.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 3)
        self.inner = nn.Linear(3, 5)
        self.norm = nn.LayerNorm(5)
        self.wide = nn.Linear(5, width)
        self.outer = nn.Linear(width, 3, bias=False)
        self.head = nn.Linear(3, VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:  # (N,) -> (N, V)
        hidden = self.norm(torch.tanh(self.inner(self.embedding(tokens))))
        detour = self.outer(torch.tanh(self.wide(hidden))) * (10 / self.wide.out_features)
        return {"logits": self.head(hidden[:, :3] + detour)}


def new_net(seed: int = 0, width: int = WIDTH) -> Net:
    torch.manual_seed(seed)
    return Net(width)


def micro_batches(step: int) -> list[Tensor]:
    """Return the global batch of a step: 3 to 5 micro-batches of 2 to 9 tokens."""
    generator = torch.Generator().manual_seed(step)
    counts = torch.randint(2, 10, (3 + step % 3,), generator=generator)
    return [torch.randint(0, VOCAB, (int(n),), generator=generator) for n in counts]


def loss_of(logits: Tensor, tokens: Tensor, num_tokens: int) -> Tensor:
    targets = (tokens * 3 + 1) % VOCAB
    return nn.functional.cross_entropy(logits.float(), targets, reduction="sum") / num_tokens


def train_step(engine: Engine, step: int) -> tuple[float, float]:
    """Train one step on this rank's unequal share; return the global loss and gradient norm."""
    batch = micro_batches(step)
    num_tokens = sum(len(tokens) for tokens in batch)
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    own_share = batch[rank::num_ranks]
    total = torch.zeros(())
    for index in range(-(-len(batch) // num_ranks)):
        tokens = own_share[index] if index < len(own_share) else batch[0]
        loss = loss_of(engine(tokens)["logits"], tokens, num_tokens)
        loss = loss if index < len(own_share) else loss * 0
        engine.backward(loss)
        total += loss.detach()
    norm = engine.step()
    dist.all_reduce(total)
    return float(total), norm


def new_engine(case: EngineSetup, module: nn.Module | None = None) -> Engine:
    return Engine(
        case.net() if module is None else module,
        engine=case.config(),
        optimizer=OPTIMIZER,
        total_steps=TOTAL_STEPS,
        device=CPU,
    )


@dataclass
class Outcome:
    losses: list[float]
    norms: list[float]
    weights: dict[str, np.ndarray]
    """Results on rank 0."""


def to_numpy(items: Sequence[tuple[str, Tensor]]) -> dict[str, np.ndarray]:
    return {name: tensor.detach().float().numpy() for name, tensor in items}


def train(case: EngineSetup, steps: int) -> Outcome:
    """Train from the seed."""
    engine = new_engine(case)
    return _outcome(engine, [train_step(engine, step) for step in range(steps)])


def train_and_save(case: EngineSetup, steps: int, directory: Path) -> Outcome:
    engine = new_engine(case)
    done = [train_step(engine, step) for step in range(steps)]
    save(engine, directory)
    return _outcome(engine, done)


def save(engine: Engine, directory: Path) -> None:
    engine.snapshot().write(directory)
    dist.barrier()  # a rank loads the files of all ranks


def load_and_train(case: EngineSetup, steps: int, directory: Path) -> Outcome:
    """Resume a checkpoint in a new engine that starts with other weights."""
    engine = new_engine(case, case.net(seed=99))
    engine.load(directory)
    return _outcome(engine, [train_step(engine, engine.steps) for _ in range(steps)])


def _outcome(engine: Engine, done: Sequence[tuple[float, float]]) -> Outcome:
    weights = to_numpy(list(gather_weights(engine.module)))
    return Outcome([loss for loss, _ in done], [norm for _, norm in done], weights)


def run_all(function: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
    """Return `function(*a)` for every `a` of `arguments`, with one call to the ranks."""
    return [function(*each) for each in zip(*arguments, strict=True)]


def reference(steps: int) -> Outcome:
    """Train the same steps in plain torch."""
    net = new_net()
    adam = torch.optim.AdamW(
        [
            {"params": [net.inner.weight, net.wide.weight, net.outer.weight], "weight_decay": 0.1},
            {
                "params": [
                    net.embedding.weight,
                    net.inner.bias,
                    net.wide.bias,
                    *net.norm.parameters(),
                ],
                "weight_decay": 0.0,
            },
        ],
        betas=OPTIMIZER.betas,
        eps=OPTIMIZER.eps,
    )
    losses, norms = [], []
    for step in range(steps):
        batch = micro_batches(step)
        num_tokens = sum(len(tokens) for tokens in batch)
        loss = torch.zeros(())
        for tokens in batch:
            loss = loss + loss_of(net(tokens)["logits"], tokens, num_tokens)
        loss.backward()
        losses.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(net.parameters(), OPTIMIZER.max_grad_norm).item())
        for group in adam.param_groups:
            group["lr"] = learning_rate(step, TOTAL_STEPS, OPTIMIZER)
        adam.step()
        adam.zero_grad()
    return Outcome(losses, norms, to_numpy(list(net.named_parameters())))

"""The training loop of one worker. Ray Train starts it; every rank runs the same steps."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from medgpt.artifacts import Folder
from medgpt.config.base import ConfigError
from medgpt.config.stages import TrainStageConfig
from medgpt.data.loader.order import VALIDATION
from medgpt.data.loader.packed_row import Row
from medgpt.data.loader.plan import Plan
from medgpt.data.loader.stream import Step, first_rows, training_stream
from medgpt.disk import storage_errors
from medgpt.engine import Engine
from medgpt.metrics import MetricsWriter
from medgpt.runs import Run
from medgpt.train.audit import Audit
from medgpt.train.checkpointing import Saver, raise_together
from medgpt.train.progress import Started, Trained

VALIDATION_ROWS = 256  # packed rows in a validation pass, at most
ASK_EVERY_S = 2  # whether Ray has announced the end of a node


class Loss(NamedTuple):
    """Of a micro-batch."""

    share: Tensor  # () float32, of the loss of the global batch
    counts: Tensor | None = None  # (num_counts,) float32, what metrics are made of


def flat(loss: Loss) -> Tensor:
    """(1 + num_counts,) float32: the share of the loss, then the counts."""
    share = loss.share.detach()[None]
    return share if loss.counts is None else torch.cat([share, loss.counts])


class Objective(Protocol):
    """What a stage trains: a module, and the loss of what it makes of a batch."""

    @property
    def num_counts(self) -> int: ...
    @property
    def module(self) -> torch.nn.Module: ...
    def batch(self, rows: Sequence[Row], *, epoch: int) -> Any: ...
    def empty_batch(self) -> Any: ...
    def loss_options(self, rows: Sequence[Row], *, epoch: int) -> dict[str, Any]: ...
    def loss(self, engine: Engine, batch: Any, *, num_targets: float, **options: Any) -> Loss: ...
    def metrics(self, counts: Sequence[float], *, held_out: bool) -> dict[str, float]:
        """Of a step's counts, or of a validation's, summed over micro-batches and ranks."""
        ...

    def finish(self, trainer: "Trainer") -> None:
        """After the last step, before the export. Collective."""
        ...

    def export(self, engine: Engine, directory: Path) -> None:
        """Write a Hugging Face folder. Collective."""
        ...


class Progress(Protocol):
    """Where rank 0 tells how far it is."""

    def put(self, item: Any) -> None: ...


class NodeEnds(Exception):
    """Ray announced the end of a worker's node; the run is saved at the step it has reached."""


class Agreed(NamedTuple):
    """What the ranks told each other in a step."""

    ask: bool  # now whether a node ends
    written: bool  # is the pending checkpoint, by all
    refused: bool  # one has met what the user must repair


@dataclass
class Position:
    """Where a run stands; all of it is in every checkpoint."""

    step: int = 0
    time_s: float = 0.0
    tokens: int = 0
    best_loss: float | None = None  # on held-out rows, after at least one step
    best_step: int = 0


class Trainer:
    """One rank of a supervised run."""

    def __init__(
        self,
        run: Run,
        config: TrainStageConfig,
        objective: Objective,
        *,
        device: torch.device,
        progress: Progress | None,
        node_ends: Callable[[], bool],
    ) -> None:
        """`node_ends` is asked by all ranks together and answers all alike."""
        self.run, self.config, self.objective, self.device = run, config, objective, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.node_ends, self.asked = node_ends, time.monotonic()
        self.refusal: ConfigError | None = None  # of this rank
        self.plan = Plan(
            run.plan.url,
            global_batch_size=config.train.global_batch_size,
            max_steps=config.train.max_steps,
        )
        checkpoint = self._newest_checkpoint()
        self.position = Position(**checkpoint[1]) if checkpoint else Position()
        self.stream = training_stream(  # starts to read while the engine is built
            self.plan,
            run.data.url,
            rank=self.rank,
            world_size=self.world_size,
            start=self.position.step,
            data_cpus=config.cluster.data_cpus,
        )
        self.engine = Engine(
            objective.module,
            engine=config.engine,
            optimizer=config.optimizer,
            total_steps=self.plan.num_steps,
            device=device,
        )
        self.restored: dict[str, float] = {}  # metrics of the first step
        if checkpoint:
            began = time.monotonic()
            with Folder(checkpoint[0]).local() as directory:
                self.engine.load(directory)
            name = "restore" if checkpoint[2] == self.world_size else "reshard"
            self.restored = {f"time/{name}_s": time.monotonic() - began}
        self.attempt = self._begin_attempt()
        self.saver = Saver(run, attempt=self.attempt, keep=config.train.keep_checkpoints)
        self.process = psutil.Process()
        self.audit = Audit(run.folder / "audit", attempt=self.attempt, rank=self.rank)
        self.progress = progress if self.rank == 0 else None
        if self.progress is not None:
            self.progress.put(
                Started(attempt=self.attempt, step=self.position.step, num_workers=self.world_size)
            )
        self.metrics = (
            MetricsWriter(run, attempt=self.attempt, time_s=self.position.time_s)
            if self.rank == 0
            else None
        )
        rows = self.first_rows(epoch=VALIDATION, limit=VALIDATION_ROWS)
        self.validation = self.micro_batches(rows, num_rows=self.most_rows(rows), epoch=VALIDATION)

    def fit(self) -> None:
        """Train from the newest checkpoint to the end; the last step is validated and saved.

        Raises:
            NodeEnds: on all ranks, after a checkpoint of the step that was reached.
            ConfigError: on all ranks, the disk of one is full.
        """
        if self.position.step == 0:
            self._validate()
        began = time.monotonic()
        for step in self.stream:
            data_s = time.monotonic() - began
            agreed = self._train(step, data_s=data_s)
            if agreed.refused:
                break
            last = self.position.step == self.plan.num_steps
            improved = False
            if last or self.position.step % self.config.train.eval_every == 0:
                improved = self._validate()
            leave = agreed.ask and self.node_ends()
            every = self.config.train.checkpoint_every
            if leave or last or improved or self.position.step % every == 0:
                self._save()
            elif agreed.written:
                self._finish_save()
            if leave and not last:
                self._finish_save()
                raise NodeEnds(f"a node ends; the run is saved at step {self.position.step}")
            began = time.monotonic()
        if self.saver.pending:
            self._finish_save()
        raise_together(self.refusal)
        if self.metrics is not None:
            self.metrics.close()

    def _train(self, step: Step, *, data_s: float) -> Agreed:
        """One optimizer step. Losses of micro-batches and ranks add up to the global mean."""
        assert step.step == self.position.step == self.engine.steps, (
            f"stream at {step.step}, run at {self.position.step}, model at {self.engine.steps}"
        )
        began = time.monotonic()
        # for models whose own code draws; all that medgpt draws is keyed by sample
        torch.manual_seed(self.config.run.seed * 1_000_003 + step.step * 4099 + self.rank)
        batches = self.micro_batches(step.rows, num_rows=step.num_rows, epoch=step.epoch)
        num_tokens = sum(int(row.lengths.sum()) for row in step.rows)
        targets, tokens, sequences, *votes = self._sums(
            sum(batch.num_targets for batch, _ in batches),
            num_tokens,
            sum(len(row.lengths) for row in step.rows),
            *self._votes(),
        )
        self.engine.module.train()
        sums = torch.zeros(1 + self.objective.num_counts, device=self.device)
        for batch, options in batches:
            loss = self.objective.loss(self.engine, batch, num_targets=max(1.0, targets), **options)
            self.engine.backward(loss.share)
            sums += flat(loss)
        grad_norm = self.engine.step()
        loss_sum, *counts = self._sums(*sums.tolist())
        if self.config.train.audit:
            self.audit.add(step)
        self.position.step += 1
        self.position.tokens += int(tokens)
        elapsed = time.monotonic() - began
        self._report(
            {
                "train/loss": loss_sum,
                "train/grad_norm": grad_norm,
                "train/learning_rate": self.engine.learning_rate,
                "train/tokens_per_s": tokens / (elapsed + data_s),
                "train/tokens": tokens,
                "train/target_tokens": targets,
                "train/sequences": sequences,
                **self.objective.metrics(counts, held_out=False),
                "train/epoch": step.epoch,
                "time/step_s": elapsed,
                "time/data_s": data_s,
                "memory/rss_gb": self.process.memory_info().rss / 2**30,
                **self.restored,
            }
        )
        self.restored = {}
        ask, written, refused = votes
        return Agreed(ask > 0, written == self.world_size, refused > 0)

    def _votes(self) -> tuple[float, float, float]:
        """What this rank says for `Agreed`; it travels with the counts of a step."""
        ask = self.rank == 0 and time.monotonic() - self.asked > ASK_EVERY_S
        if ask:
            self.asked = time.monotonic()
        return float(ask), float(self.saver.written), float(self.refusal is not None)

    @torch.no_grad()
    def _validate(self) -> bool:
        """Log the mean loss on held-out rows; True if it is the best so far."""
        (targets,) = self._sums(sum(batch.num_targets for batch, _ in self.validation))
        if not targets:
            return False
        began = time.monotonic()
        self.engine.module.eval()
        sums = torch.zeros(1 + self.objective.num_counts, device=self.device, dtype=torch.float64)
        for batch, options in self.validation:
            sums += flat(self.objective.loss(self.engine, batch, num_targets=targets, **options))
        mean, *counts = self._sums(*sums.tolist())
        best = self.position.best_loss
        improved = self.position.step > 0 and (best is None or mean < best)
        if improved:
            self.position.best_loss, self.position.best_step = mean, self.position.step
        self._report(
            {
                "validation/loss": mean,
                **self.objective.metrics(counts, held_out=True),
                "time/validation_s": time.monotonic() - began,
            }
        )
        return improved

    def first_rows(self, *, epoch: int, limit: int) -> list[Row]:
        """This worker's share of the first rows of an epoch, or of VALIDATION."""
        return first_rows(
            self.plan,
            self.run.data.url,
            epoch=epoch,
            rank=self.rank,
            world_size=self.world_size,
            limit=limit,
        )

    def most_rows(self, rows: Sequence[Row]) -> int:
        """Of any worker. Collective."""
        return int(self._sum(float(len(rows)), op=dist.ReduceOp.MAX))

    def micro_batches(
        self, rows: Sequence[Row], *, num_rows: int, epoch: int
    ) -> list[tuple[Any, dict[str, Any]]]:
        """Batches of micro_batch_size rows, as many as the worker with `num_rows` rows makes."""
        size = self.config.train.micro_batch_size
        groups = [rows[i : i + size] for i in range(0, num_rows, size)]
        batches = []
        for group in groups:
            batch = (
                self.objective.batch(group, epoch=epoch) if group else self.objective.empty_batch()
            )
            options = self.objective.loss_options(group, epoch=epoch)
            batches.append((batch.to(self.device), options))
        return batches

    def _report(self, metrics: dict[str, float]) -> None:
        self._log(self.position.step, metrics)
        self._tell(metrics)

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        if self.metrics is not None:
            with self._refusal_kept():
                self.metrics.log(step, metrics)

    @contextmanager
    def _refusal_kept(self) -> Iterator[None]:
        """A full disk for metrics ends the run in the next step, when the other ranks know."""
        try:
            with storage_errors(self.run.folder.url, "metrics"):
                yield
        except ConfigError as error:
            self.refusal = error

    def _tell(self, metrics: dict[str, float]) -> None:
        if self.progress is not None:
            self.progress.put(
                Trained(step=self.position.step, num_steps=self.plan.num_steps, metrics=metrics)
            )

    def _newest_checkpoint(self) -> tuple[str, dict[str, Any], int] | None:
        """Address, position and number of ranks of the newest complete one, which rank 0 finds."""
        found: list[Any] = [None]
        if self.rank == 0 and (newest := self.run.newest_checkpoint()):
            found = [(newest[0].url, newest[1]["position"], newest[1]["world_size"])]
        dist.broadcast_object_list(found)
        return found[0]

    def _begin_attempt(self) -> int:
        """Number of this start of the run, from 1."""
        number: list[Any] = [None]
        if self.rank == 0:
            number = [self.run.manifest["attempt"] + 1]
            self.run.update_manifest(attempt=number[0], world_size=self.world_size)
        dist.broadcast_object_list(number)
        return number[0]

    def _save(self) -> None:
        """Begin a checkpoint of this step; that of the last step is complete at once."""
        if self.saver.pending:
            self._finish_save()
        if self.metrics is not None:
            self.position.time_s = self.metrics.time_s
            with self._refusal_kept():
                self.metrics.sync()
        lines = self.audit.take()
        self.saver.begin(
            self.engine.snapshot, vars(self.position), before=partial(self.audit.write, lines)
        )

    def _finish_save(self) -> None:
        self._log(self.position.step, self.saver.finish())

    def _sum(self, value: float, op: Any = dist.ReduceOp.SUM) -> float:
        """`value` reduced over all ranks."""
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=op)
        return tensor.item()

    def _sums(self, *values: float) -> list[float]:
        """Each value summed over all ranks, in one message."""
        tensor: Tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

"""The supervised training loop of pretraining, SFT and reward models, on one rank."""

import time
from collections.abc import Callable, Sequence
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
from medgpt.data.loader.epoch_order import VALIDATION
from medgpt.data.loader.packed_row import PackedRow
from medgpt.data.loader.plan import Plan
from medgpt.data.loader.stream import StepRows, read_first_rows, training_stream
from medgpt.disk import storage_errors
from medgpt.engine import Engine
from medgpt.metrics import MetricsWriter
from medgpt.runs import Run
from medgpt.train.audit import Audit
from medgpt.train.checkpointing import (
    AsyncCheckpointer,
    Checkpoint,
    begin_attempt,
    newest_checkpoint,
)
from medgpt.train.collectives import all_gather, raise_on_all_ranks
from medgpt.train.progress import AsyncQueue, AttemptStarted, StepReport

MAX_VALIDATION_ROWS = 256  # packed rows of a validation pass
PREEMPTION_CHECK_S = 2  # seconds between checks whether Ray drains a node

Batch = tuple[Any, dict[str, Any]]  # a batch on the device and the keyword arguments of its loss


class Objective(Protocol):
    """Training objective of a stage: module, batches, loss, metrics and export."""

    @property
    def num_metric_sums(self) -> int: ...
    @property
    def module(self) -> torch.nn.Module: ...
    def collate(self, rows: Sequence[PackedRow], *, epoch: int) -> Any:
        """Return a batch; an empty one of `rows` is empty."""
        ...

    def loss_kwargs(self, rows: Sequence[PackedRow], *, epoch: int) -> dict[str, Any]: ...
    def loss(
        self, engine: Engine, batch: Any, *, num_targets: float, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the share of the global batch's loss () and (num_metric_sums,), float32."""
        ...

    def metrics(self, metric_sums: Sequence[float], *, held_out: bool) -> dict[str, float]:
        """Return metrics of sums over all micro-batches and ranks."""
        ...

    def on_train_end(self, trainer: "Trainer") -> None:
        """Run after the last step and before the export. Collective."""
        ...

    def export(self, engine: Engine, directory: Path) -> None:
        """Write a Hugging Face folder. Collective."""
        ...


class Preempted(Exception):
    """Ray drains the node of a worker; the run is saved at the current step."""


class StepFlags(NamedTuple):
    """Flags that all ranks agree on in a step."""

    check_preemption: bool  # call is_preempted now
    checkpoint_written: bool  # the pending one, by all ranks
    failed: bool  # a rank met an error that the user must fix


@dataclass
class TrainerState:
    """State of the loop, saved in every checkpoint."""

    step: int = 0
    time_s: float = 0.0
    tokens: int = 0
    best_loss: float | None = None  # on held-out rows, after at least one step
    best_step: int = 0


class Trainer:
    """Trains one rank of a supervised run; all ranks run the same steps."""

    def __init__(
        self,
        run: Run,
        config: TrainStageConfig,
        objective: Objective,
        *,
        device: torch.device,
        progress: AsyncQueue | None,
        is_preempted: Callable[[], bool],
    ) -> None:
        """`is_preempted` is called by all ranks in the same step and returns the same on all."""
        self.run, self.config, self.objective, self.device = run, config, objective, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.is_preempted, self.checked_at = is_preempted, time.monotonic()
        self.errors: list[ConfigError] = []  # the other ranks learn of them in the next step
        self.plan = Plan(
            run.plan.url,
            global_batch_size=config.train.global_batch_size,
            max_steps=config.train.max_steps,
        )
        checkpoint = newest_checkpoint(run)
        self.state = TrainerState(**checkpoint.state) if checkpoint else TrainerState()
        self.stream = training_stream(  # starts to read while the engine is built
            self.plan,
            run.data.url,
            rank=self.rank,
            world_size=self.world_size,
            start=self.state.step,
            data_cpus=config.cluster.data_cpus,
        )
        self.engine = Engine(
            objective.module,
            engine=config.engine,
            optimizer=config.optimizer,
            total_steps=self.plan.num_steps,
            device=device,
        )
        self.restore_metrics: dict[str, float] = {}  # logged with the first step
        if checkpoint:
            self._restore(checkpoint)
        self.attempt = begin_attempt(run)
        self.checkpointer = AsyncCheckpointer(
            run, attempt=self.attempt, keep=config.train.keep_checkpoints
        )
        self.process = psutil.Process()
        self.audit = Audit(run.folder / "audit", attempt=self.attempt, rank=self.rank)
        self.metrics: MetricsWriter | None = None
        self.progress: AsyncQueue | None = None
        if self.rank == 0:
            self.metrics = MetricsWriter(run, attempt=self.attempt, time_s=self.state.time_s)
            self.progress = progress
        self._send(
            AttemptStarted(attempt=self.attempt, step=self.state.step, num_workers=self.world_size)
        )
        rows = self.first_rows(epoch=VALIDATION, limit=MAX_VALIDATION_ROWS)
        self.validation_batches = self.validation_micro_batches(rows)

    def _restore(self, checkpoint: Checkpoint) -> None:
        began = time.monotonic()
        with Folder(checkpoint.url).local() as directory:
            self.engine.load(directory)
        name = "restore" if checkpoint.world_size == self.world_size else "reshard"
        self.restore_metrics = {f"time/{name}_s": time.monotonic() - began}

    def fit(self) -> None:
        """Train from the newest checkpoint to the last step, which is validated and saved.

        Raises:
            Preempted: on all ranks, after a checkpoint of the current step.
            ConfigError: on all ranks, if the disk of one is full.
        """
        if self.state.step == 0:
            self._validate()
        began = time.monotonic()
        for step in self.stream:
            data_s = time.monotonic() - began
            flags = self._train_step(step, data_s=data_s)
            if flags.failed:
                break
            is_last = self.state.step == self.plan.num_steps
            is_due = is_last or self.state.step % self.config.train.eval_every == 0
            improved = is_due and self._validate()
            is_preempted = flags.check_preemption and self.is_preempted()
            checkpoint_every = self.config.train.checkpoint_every
            if is_preempted or is_last or improved or self.state.step % checkpoint_every == 0:
                self._begin_checkpoint()
            elif flags.checkpoint_written:
                self._finish_checkpoint()
            if is_preempted and not is_last:
                self._finish_checkpoint()
                raise Preempted(f"a node is drained; the run is saved at step {self.state.step}")
            began = time.monotonic()
        if self.checkpointer.pending:
            self._finish_checkpoint()
        raise_on_all_ranks(self.errors)
        if self.metrics is not None:
            self.metrics.close()

    def _train_step(self, step: StepRows, *, data_s: float) -> StepFlags:
        """Run an optimizer step. Losses of micro-batches and ranks add up to the global mean."""
        assert step.step == self.state.step == self.engine.steps, (
            f"stream at {step.step}, run at {self.state.step}, model at {self.engine.steps}"
        )
        began = time.monotonic()
        # for dropout in a model's own code; what medgpt draws is keyed by sample
        torch.manual_seed(self.config.run.seed * 1_000_003 + step.step * 4099 + self.rank)
        batches = self._micro_batches(step.rows, num_rows=step.num_rows, epoch=step.epoch)
        num_tokens = sum(int(row.lengths.sum()) for row in step.rows)
        targets, tokens, sequences, *flag_sums = self._all_reduce(
            sum(batch.num_targets for batch, _ in batches),
            num_tokens,
            sum(len(row.lengths) for row in step.rows),
            *self._local_flags(),
        )
        self.engine.module.train()
        sums = self._run_batches(batches, num_targets=max(1.0, targets), dtype=torch.float32)
        grad_norm = self.engine.step()
        loss_sum, *metric_sums = self._all_reduce(*sums.tolist())
        if self.config.train.audit:
            self.audit.add(step)
        self.state.step += 1
        self.state.tokens += int(tokens)
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
                **self.objective.metrics(metric_sums, held_out=False),
                "train/epoch": step.epoch,
                "time/step_s": elapsed,
                "time/data_s": data_s,
                "memory/rss_gb": self.process.memory_info().rss / 2**30,
                **self.restore_metrics,
            }
        )
        self.restore_metrics = {}
        check_preemption, num_written, num_failed = flag_sums
        return StepFlags(check_preemption > 0, num_written == self.world_size, num_failed > 0)

    def _local_flags(self) -> tuple[bool, bool, bool]:
        """Return this rank's values of StepFlags, which are reduced with the token counts."""
        is_due = self.rank == 0 and time.monotonic() - self.checked_at > PREEMPTION_CHECK_S
        if is_due:
            self.checked_at = time.monotonic()
        return is_due, self.checkpointer.is_written, bool(self.errors)

    @torch.no_grad()
    def _validate(self) -> bool:
        """Log the mean loss on held-out rows. Returns whether it is the best so far."""
        (targets,) = self._all_reduce(
            sum(batch.num_targets for batch, _ in self.validation_batches)
        )
        if not targets:
            return False
        began = time.monotonic()
        self.engine.module.eval()
        sums = self._run_batches(self.validation_batches, num_targets=targets, dtype=torch.float64)
        mean, *metric_sums = self._all_reduce(*sums.tolist())
        best = self.state.best_loss
        improved = self.state.step > 0 and (best is None or mean < best)
        if improved:
            self.state.best_loss, self.state.best_step = mean, self.state.step
        self._report(
            {
                "validation/loss": mean,
                **self.objective.metrics(metric_sums, held_out=True),
                "time/validation_s": time.monotonic() - began,
            }
        )
        return improved

    def _run_batches(
        self, batches: Sequence[Batch], *, num_targets: float, dtype: torch.dtype
    ) -> Tensor:
        """Return summed loss and metric sums (1 + num_metric_sums,); backpropagate in training."""
        sums = torch.zeros(1 + self.objective.num_metric_sums, device=self.device, dtype=dtype)
        for batch, kwargs in batches:
            loss, metric_sums = self.objective.loss(
                self.engine, batch, num_targets=num_targets, **kwargs
            )
            if self.engine.module.training:
                self.engine.backward(loss)
            sums += torch.cat([loss.detach()[None], metric_sums])
        return sums

    def first_rows(self, *, epoch: int, limit: int) -> list[PackedRow]:
        """Return this rank's share of the first `limit` rows of an epoch or of VALIDATION."""
        return read_first_rows(
            self.plan,
            self.run.data.url,
            epoch=epoch,
            rank=self.rank,
            world_size=self.world_size,
            limit=limit,
        )

    def validation_micro_batches(self, rows: Sequence[PackedRow]) -> list[Batch]:
        """Return batches of this rank's `rows`, the same number on all ranks. Collective."""
        return self._micro_batches(rows, num_rows=max(all_gather(len(rows))), epoch=VALIDATION)

    def _micro_batches(
        self, rows: Sequence[PackedRow], *, num_rows: int, epoch: int
    ) -> list[Batch]:
        """Return as many batches as a rank with `num_rows` rows has."""
        size, objective = self.config.train.micro_batch_size, self.objective
        groups = [rows[i : i + size] for i in range(0, num_rows, size)]
        return [
            (
                objective.collate(g, epoch=epoch).to(self.device),
                objective.loss_kwargs(g, epoch=epoch),
            )
            for g in groups
        ]

    def _report(self, metrics: dict[str, float]) -> None:
        self._log(metrics)
        self._send(StepReport(step=self.state.step, num_steps=self.plan.num_steps, metrics=metrics))

    def _send(self, message: object) -> None:
        if self.progress is not None:
            self.progress.put(message)

    def _log(self, metrics: dict[str, float]) -> None:
        if self.metrics is not None:
            with storage_errors(self.run.folder.url, "metrics", kept=self.errors):
                self.metrics.log(self.state.step, metrics)

    def _begin_checkpoint(self) -> None:
        """Start to write a checkpoint of the current step."""
        if self.checkpointer.pending:
            self._finish_checkpoint()
        if self.metrics is not None:
            self.state.time_s = self.metrics.time_s
            with storage_errors(self.run.folder.url, "metrics", kept=self.errors):
                self.metrics.sync()
        write_audit = partial(self.audit.write, self.audit.take_lines())
        self.checkpointer.begin(self.engine.snapshot, vars(self.state), write_before=write_audit)

    def _finish_checkpoint(self) -> None:
        self._log(self.checkpointer.finish())

    def _all_reduce(self, *values: float) -> list[float]:
        """Return each value summed over all ranks, in one all-reduce."""
        tensor: Tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

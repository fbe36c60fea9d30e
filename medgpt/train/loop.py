"""The supervised training loop of pretraining, SFT and reward models, on one rank."""

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
from medgpt.data.loader.epoch_order import VALIDATION
from medgpt.data.loader.packed_row import PackedRow
from medgpt.data.loader.plan import Plan
from medgpt.data.loader.stream import StepRows, read_first_rows, training_stream
from medgpt.disk import storage_errors
from medgpt.engine import Engine
from medgpt.metrics import MetricsWriter
from medgpt.runs import Run
from medgpt.train.audit import Audit
from medgpt.train.checkpointing import AsyncCheckpointer, raise_on_all_ranks
from medgpt.train.progress import AttemptStarted, StepReport

MAX_VALIDATION_ROWS = 256  # packed rows of a validation pass
PREEMPTION_CHECK_S = 2  # seconds between checks whether Ray drains a node


class MicroBatchLoss(NamedTuple):
    """Loss of a micro-batch and sums for metrics."""

    loss: Tensor  # () float32, share of the global batch's loss
    metric_sums: Tensor | None = None  # (num_metric_sums,) float32


def loss_and_metric_sums(loss: MicroBatchLoss) -> Tensor:
    """Return loss and metric sums as one tensor (1 + num_metric_sums,) float32."""
    loss_part = loss.loss.detach()[None]
    return loss_part if loss.metric_sums is None else torch.cat([loss_part, loss.metric_sums])


class Objective(Protocol):
    """Training objective of a stage: module, batches, loss, metrics and export."""

    @property
    def num_metric_sums(self) -> int: ...
    @property
    def module(self) -> torch.nn.Module: ...
    def collate(self, rows: Sequence[PackedRow], *, epoch: int) -> Any: ...
    def empty_batch(self) -> Any: ...
    def loss_kwargs(self, rows: Sequence[PackedRow], *, epoch: int) -> dict[str, Any]: ...
    def loss(
        self, engine: Engine, batch: Any, *, num_targets: float, **options: Any
    ) -> MicroBatchLoss: ...
    def metrics(self, metric_sums: Sequence[float], *, held_out: bool) -> dict[str, float]:
        """Return metrics of sums over all micro-batches and ranks."""
        ...

    def on_train_end(self, trainer: "Trainer") -> None:
        """Run after the last step and before the export. Collective."""
        ...

    def export(self, engine: Engine, directory: Path) -> None:
        """Write a Hugging Face folder. Collective."""
        ...


class ProgressQueue(Protocol):
    """Queue to which rank 0 reports its progress."""

    def put(self, item: Any) -> None: ...


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
        progress: ProgressQueue | None,
        is_preempted: Callable[[], bool],
    ) -> None:
        """`is_preempted` is called by all ranks in the same step and returns the same on all."""
        self.run, self.config, self.objective, self.device = run, config, objective, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.is_preempted, self.preemption_checked_at = is_preempted, time.monotonic()
        self.storage_error: ConfigError | None = None  # of this rank alone
        self.plan = Plan(
            run.plan.url,
            global_batch_size=config.train.global_batch_size,
            max_steps=config.train.max_steps,
        )
        checkpoint = self._newest_checkpoint()
        self.state = TrainerState(**checkpoint[1]) if checkpoint else TrainerState()
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
            began = time.monotonic()
            with Folder(checkpoint[0]).local() as directory:
                self.engine.load(directory)
            name = "restore" if checkpoint[2] == self.world_size else "reshard"
            self.restore_metrics = {f"time/{name}_s": time.monotonic() - began}
        self.attempt = self._begin_attempt()
        self.checkpointer = AsyncCheckpointer(
            run, attempt=self.attempt, keep=config.train.keep_checkpoints
        )
        self.process = psutil.Process()
        self.audit = Audit(run.folder / "audit", attempt=self.attempt, rank=self.rank)
        self.progress = progress if self.rank == 0 else None
        if self.progress is not None:
            self.progress.put(
                AttemptStarted(
                    attempt=self.attempt, step=self.state.step, num_workers=self.world_size
                )
            )
        self.metrics = (
            MetricsWriter(run, attempt=self.attempt, time_s=self.state.time_s)
            if self.rank == 0
            else None
        )
        rows = self.local_first_rows(epoch=VALIDATION, limit=MAX_VALIDATION_ROWS)
        self.validation_batches = self.micro_batches(
            rows, num_rows=self.max_rows_per_rank(rows), epoch=VALIDATION
        )

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
            improved = False
            if is_last or self.state.step % self.config.train.eval_every == 0:
                improved = self._validate()
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
        raise_on_all_ranks(self.storage_error)
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
        batches = self.micro_batches(step.rows, num_rows=step.num_rows, epoch=step.epoch)
        num_tokens = sum(int(row.lengths.sum()) for row in step.rows)
        targets, tokens, sequences, *flag_sums = self._all_reduce_sums(
            sum(batch.num_targets for batch, _ in batches),
            num_tokens,
            sum(len(row.lengths) for row in step.rows),
            *self._local_flags(),
        )
        self.engine.module.train()
        sums = torch.zeros(1 + self.objective.num_metric_sums, device=self.device)
        for batch, options in batches:
            loss = self.objective.loss(self.engine, batch, num_targets=max(1.0, targets), **options)
            self.engine.backward(loss.loss)
            sums += loss_and_metric_sums(loss)
        grad_norm = self.engine.step()
        loss_sum, *metric_sums = self._all_reduce_sums(*sums.tolist())
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

    def _local_flags(self) -> tuple[float, float, float]:
        """Return this rank's values of StepFlags, which are reduced with the token counts."""
        check_preemption = (
            self.rank == 0 and time.monotonic() - self.preemption_checked_at > PREEMPTION_CHECK_S
        )
        if check_preemption:
            self.preemption_checked_at = time.monotonic()
        return (
            float(check_preemption),
            float(self.checkpointer.is_written),
            float(self.storage_error is not None),
        )

    @torch.no_grad()
    def _validate(self) -> bool:
        """Log the mean loss on held-out rows. Returns whether it is the best so far."""
        (targets,) = self._all_reduce_sums(
            sum(batch.num_targets for batch, _ in self.validation_batches)
        )
        if not targets:
            return False
        began = time.monotonic()
        self.engine.module.eval()
        sums = torch.zeros(
            1 + self.objective.num_metric_sums, device=self.device, dtype=torch.float64
        )
        for batch, options in self.validation_batches:
            sums += loss_and_metric_sums(
                self.objective.loss(self.engine, batch, num_targets=targets, **options)
            )
        mean, *metric_sums = self._all_reduce_sums(*sums.tolist())
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

    def local_first_rows(self, *, epoch: int, limit: int) -> list[PackedRow]:
        """Return this rank's share of the first `limit` rows of an epoch or of VALIDATION."""
        return read_first_rows(
            self.plan,
            self.run.data.url,
            epoch=epoch,
            rank=self.rank,
            world_size=self.world_size,
            limit=limit,
        )

    def max_rows_per_rank(self, rows: Sequence[PackedRow]) -> int:
        """Return the largest number of rows of any rank. Collective."""
        return int(self._all_reduce(float(len(rows)), op=dist.ReduceOp.MAX))

    def micro_batches(
        self, rows: Sequence[PackedRow], *, num_rows: int, epoch: int
    ) -> list[tuple[Any, dict[str, Any]]]:
        """Return batches and loss arguments, as many as a rank with `num_rows` rows has."""
        size = self.config.train.micro_batch_size
        groups = [rows[i : i + size] for i in range(0, num_rows, size)]
        batches = []
        for group in groups:
            batch = (
                self.objective.collate(group, epoch=epoch)
                if group
                else self.objective.empty_batch()
            )
            options = self.objective.loss_kwargs(group, epoch=epoch)
            batches.append((batch.to(self.device), options))
        return batches

    def _report(self, metrics: dict[str, float]) -> None:
        self._log(self.state.step, metrics)
        self._send_progress(metrics)

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        if self.metrics is not None:
            with self._keep_storage_error():
                self.metrics.log(step, metrics)

    @contextmanager
    def _keep_storage_error(self) -> Iterator[None]:
        """Keep a storage error until the next step, in which all ranks learn of it."""
        try:
            with storage_errors(self.run.folder.url, "metrics"):
                yield
        except ConfigError as error:
            self.storage_error = error

    def _send_progress(self, metrics: dict[str, float]) -> None:
        if self.progress is not None:
            self.progress.put(
                StepReport(step=self.state.step, num_steps=self.plan.num_steps, metrics=metrics)
            )

    def _newest_checkpoint(self) -> tuple[str, dict[str, Any], int] | None:
        """Return URL, state and world size of the newest checkpoint, which rank 0 looks up."""
        checkpoint: list[Any] = [None]
        if self.rank == 0 and (newest := self.run.newest_checkpoint()):
            checkpoint = [(newest[0].url, newest[1]["position"], newest[1]["world_size"])]
        dist.broadcast_object_list(checkpoint)
        return checkpoint[0]

    def _begin_attempt(self) -> int:
        """Return the number of this start of the run, from 1."""
        number: list[Any] = [None]
        if self.rank == 0:
            number = [self.run.manifest["attempt"] + 1]
            self.run.update_manifest(attempt=number[0], world_size=self.world_size)
        dist.broadcast_object_list(number)
        return number[0]

    def _begin_checkpoint(self) -> None:
        """Start to write a checkpoint of the current step."""
        if self.checkpointer.pending:
            self._finish_checkpoint()
        if self.metrics is not None:
            self.state.time_s = self.metrics.time_s
            with self._keep_storage_error():
                self.metrics.sync()
        lines = self.audit.take_lines()
        self.checkpointer.begin(
            self.engine.snapshot, vars(self.state), write_before=partial(self.audit.write, lines)
        )

    def _finish_checkpoint(self) -> None:
        self._log(self.state.step, self.checkpointer.finish())

    def _all_reduce(self, value: float, op: Any = dist.ReduceOp.SUM) -> float:
        """Return `value` reduced over all ranks."""
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=op)
        return tensor.item()

    def _all_reduce_sums(self, *values: float) -> list[float]:
        """Return each value summed over all ranks, in one all-reduce."""
        tensor: Tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

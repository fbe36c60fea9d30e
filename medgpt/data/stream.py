"""The training stream of one worker: the rows of its slots, from a step on, through Ray Data.

Which rows these are follows from the plan (order.py) alone, so a resumed stream starts anywhere at
the same cost, with any number of workers. Ray Data reads tokens ahead of the trainer, with
backpressure; what it moves are packed rows, each assembled once, on whichever node has a free CPU.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray
from ray.data._internal.execution.execution_callback import ExecutionCallback

from medgpt.data.order import VALIDATION, Index, Rows, plan_epoch
from medgpt.data.shards import data_version, read_block, read_index
from medgpt.runs import Folder

ROWS_PER_TASK = 64
PACE_S = 0.05
CHUNK_COLUMNS = ("block", "row", "start", "stop", "chunk", "sample_id")
PLAN_SCHEMA = pa.schema(
    {
        "step": pa.int64(),
        **{name: pa.list_(pa.int64()) for name in CHUNK_COLUMNS[:-1]},
        "sample_id": pa.list_(pa.string()),
    }
)


@dataclass(frozen=True, kw_only=True)
class StreamSpec:
    """What decides the order of data, and how it is read; the same on every worker."""

    data_url: str
    max_length: int
    global_batch_size: int
    seed: int
    epochs: int
    max_steps: int | None
    weights: tuple[float, ...] | None
    data_cpus: float = 1  # that a reading task reserves


@dataclass(frozen=True, kw_only=True)
class Row:
    """A packed row of C chunks with N tokens."""

    input_ids: NDArray[np.int32]  # (N,)
    targets: NDArray[np.bool_]  # (N,) True where the token is to be learnt
    word_ids: NDArray[np.int32] | None  # (N,)
    lengths: NDArray[np.int64]  # (C,) tokens of each chunk
    sample_ids: list[str]  # (C,)
    chunks: list[int]  # (C,)


@dataclass(frozen=True, kw_only=True)
class Step:
    """This worker's share of one optimizer step."""

    epoch: int
    step: int  # from 0, over all epochs
    rows: list[Row]  # of this worker, may be fewer than others have, even none
    num_rows: int  # of the worker with most


class Plan:
    """The rows of every step, on all workers."""

    def __init__(self, spec: StreamSpec) -> None:
        self.spec = spec
        self.index = read_index(Folder(spec.data_url), "train")
        weights = None if spec.weights is None else np.array(spec.weights)
        self.epochs: list[Rows] = []
        self.first_step = [0]
        for epoch in range(spec.epochs):
            if spec.max_steps is not None and self.first_step[-1] >= spec.max_steps:
                break
            rows = plan_epoch(
                self.index,
                max_length=spec.max_length,
                seed=spec.seed,
                epoch=epoch,
                weights=weights,
            )
            self.epochs.append(rows)
            steps = -(-len(rows) // spec.global_batch_size)
            self.first_step.append(self.first_step[-1] + steps)

    @property
    def num_steps(self) -> int:
        limit = self.spec.max_steps
        return self.first_step[-1] if limit is None else min(limit, self.first_step[-1])

    def table(self, *, rank: int, world_size: int, start: int) -> pa.Table:
        """The rows of a worker from step `start` on, one table row each."""
        parts = []
        for epoch, rows in enumerate(self.epochs):
            number = np.arange(len(rows))
            step = self.first_step[epoch] + number // self.spec.global_batch_size
            slot = number % self.spec.global_batch_size
            mine = (slot % world_size == rank) & (step >= start) & (step < self.num_steps)
            if mine.any():
                parts.append(_row_table(self.index, rows, number[mine], step[mine]))
        return pa.concat_tables(parts) if parts else PLAN_SCHEMA.empty_table()

    def batch_rows(self, step: int) -> int:
        """Rows of the global batch."""
        epoch = self.epoch_of(step)
        done = (step - self.first_step[epoch]) * self.spec.global_batch_size
        return min(self.spec.global_batch_size, len(self.epochs[epoch]) - done)

    def epoch_of(self, step: int) -> int:
        return int(np.searchsorted(self.first_step, step, side="right")) - 1


def training_stream(plan: Plan, *, rank: int, world_size: int, start: int) -> Iterator[Step]:
    """Steps from `start` to the end, in order, the same number on every worker.

    Reading starts at the call, because Ray Data takes seconds until the first rows come.
    """
    table = plan.table(rank=rank, world_size=world_size, start=start)
    rows = _read_ahead(table, plan.spec)
    first = ThreadPoolExecutor(1).submit(next, rows, None)
    return _steps(plan, rows, first, world_size=world_size, start=start)


def _steps(
    plan: Plan,
    rows: Iterator[tuple[int, Row]],
    first: Future[tuple[int, Row] | None],
    *,
    world_size: int,
    start: int,
) -> Iterator[Step]:
    pending = first.result()
    for step in range(start, plan.num_steps):
        mine = []
        while pending is not None and pending[0] == step:
            mine.append(pending[1])
            pending = next(rows, None)
        num_rows = -(-plan.batch_rows(step) // world_size)
        yield Step(epoch=plan.epoch_of(step), step=step, rows=mine, num_rows=num_rows)
    assert pending is None, "the stream holds rows of steps that are not in the plan"


def validation_rows(spec: StreamSpec, *, rank: int, world_size: int, limit: int) -> list[Row]:
    """This worker's share of the first `limit` rows of the held-out split; it reads them itself."""
    index = read_index(Folder(spec.data_url), "validation")
    if not len(index):
        return []
    rows = plan_epoch(
        index, max_length=spec.max_length, seed=spec.seed, epoch=VALIDATION, weights=None
    )
    number = np.arange(min(limit, len(rows)))[rank::world_size]
    if not len(number):
        return []
    table = _row_table(index, rows, number, np.zeros_like(number))
    version = data_version(spec.data_url)
    batch = assemble(table, url=spec.data_url, split="validation", version=version)
    return [row for _, row in unpack(batch)]


def _read_ahead(table: pa.Table, spec: StreamSpec) -> Iterator[tuple[int, Row]]:
    """(step, row) in the table's order, read ahead by Ray Data."""
    if not table.num_rows:
        return
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.custom_execution_callback_classes = [Pace]
    tasks = [table.slice(i, ROWS_PER_TASK) for i in range(0, table.num_rows, ROWS_PER_TASK)]
    version = data_version(spec.data_url)
    dataset = ray.data.from_arrow(tasks).map_batches(
        partial(assemble, url=spec.data_url, split="train", version=version),
        batch_format="pyarrow",
        batch_size=None,
        zero_copy_batch=True,
        num_cpus=spec.data_cpus,
    )
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
        yield from unpack(batch)


class Pace(ExecutionCallback):
    """Gives the trainer its core back.

    Ray Data's scheduling loop waits only for running tasks; while its output is full, most of the
    time here, it would spin and hold the interpreter's lock for half of it.
    """

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(PACE_S)


def _row_table(
    index: Index, rows: Rows, picked: NDArray[np.int64], steps: NDArray[np.int64]
) -> pa.Table:
    """The plan of the picked rows; a table row lists the chunks of a packed row."""
    counts = rows.bounds[picked + 1] - rows.bounds[picked]
    offsets = np.append(0, np.cumsum(counts))
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], counts)
    chunks = np.repeat(rows.bounds[picked], counts) + within
    sample = rows.sample[chunks]
    values = {
        "block": index.block[sample],
        "row": index.row[sample],
        "start": rows.start[chunks],
        "stop": rows.stop[chunks],
        "chunk": rows.chunk[chunks],
        "sample_id": index.sample_id[sample].astype(str),
    }
    lists = {name: _lists(offsets, value) for name, value in values.items()}
    return pa.table({"step": steps, **lists}, schema=PLAN_SCHEMA)


def _lists(offsets: NDArray[np.int64], values: NDArray[Any]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


def assemble(plan: pa.Table, *, url: str, split: str, version: str) -> pa.Table:
    """Plan rows in, packed rows out: the tokens of their chunks."""
    plan = plan.combine_chunks()
    chunk = {name: _flat(plan[name]) for name in CHUNK_COLUMNS[:-1]}
    parts: dict[str, list[NDArray[Any]]] = {"input_ids": [], "targets": [], "word_ids": []}
    blocks = (read_block(url, split, int(number), version) for number in chunk["block"])
    for tokens, row, start, stop in zip(
        blocks, chunk["row"], chunk["start"], chunk["stop"], strict=True
    ):
        span = slice(tokens.offsets[row] + start, tokens.offsets[row] + stop)
        parts["input_ids"].append(tokens.input_ids[span])
        parts["targets"].append(tokens.targets[span])
        if tokens.word_ids is not None:
            parts["word_ids"].append(tokens.word_ids[span])
    lengths = chunk["stop"] - chunk["start"]
    rows = _offsets(plan["chunk"])
    token_offsets = np.append(0, np.cumsum(lengths))[rows]
    columns = {
        name: _lists(token_offsets, np.concatenate(values))
        for name, values in parts.items()
        if values
    }
    columns["lengths"] = _lists(rows, lengths)
    return pa.table(
        {"step": plan["step"], **columns, "chunk": plan["chunk"], "sample_id": plan["sample_id"]}
    )


def unpack(batch: pa.Table) -> Iterator[tuple[int, Row]]:
    """(step, row) of every packed row."""
    batch = batch.combine_chunks()
    names = [name for name in batch.column_names if name != "step"]
    values = {name: _flat(batch[name]) for name in names}
    offsets = {name: _offsets(batch[name]) for name in names}
    for i, step in enumerate(batch["step"].to_pylist()):
        cut = {n: values[n][offsets[n][i] : offsets[n][i + 1]] for n in names}
        yield (
            step,
            Row(
                input_ids=cut["input_ids"],
                targets=cut["targets"],
                word_ids=cut.get("word_ids"),
                lengths=cut["lengths"],
                sample_ids=cut["sample_id"].tolist(),
                chunks=cut["chunk"].tolist(),
            ),
        )


def _flat(column: pa.ChunkedArray) -> NDArray[Any]:
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False)


def _offsets(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """(R + 1,) bounds of the lists in the flattened column."""
    return np.append(0, np.cumsum(column.combine_chunks().value_lengths().to_numpy()))

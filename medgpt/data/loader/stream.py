"""Training stream of one worker: its rows of every step, read ahead with Ray Data.

The plan (plan.py) lists the rows, so a resumed stream starts at any step at the same cost, with any
number of workers. Ray Data reads ahead with backpressure; each packed row is assembled once, on a
node with a free CPU.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray

from medgpt.data.loader.epoch_order import VALIDATION
from medgpt.data.loader.packed_row import PackedRow
from medgpt.data.loader.plan import Plan, list_offsets, list_values
from medgpt.data.loader.ray_internals import NoAutoscaling
from medgpt.data.tokenized.shards import OPTIONAL_COLUMNS, SHARD_SCHEMA, read_block

TOKENS_PER_TASK = 2**18  # a task has an overhead of 20 ms or more
ROWS_PER_TASK = 64  # without max_length
TASKS_PER_PIPELINE = 64


@dataclass(frozen=True, kw_only=True)
class StepRows:
    """This worker's share of one optimizer step."""

    epoch: int
    step: int  # from 0, over all epochs
    rows: list[PackedRow]  # of this worker; may be fewer than others have, or none
    num_rows: int  # rows of the worker with the most rows


def training_stream(
    plan: Plan, data_url: str, *, rank: int, world_size: int, start: int, data_cpus: float = 1
) -> Iterator[StepRows]:
    """Iterate over the steps from `start` to the end, the same number on every worker.

    Reading starts at the call, because Ray Data takes seconds to deliver the first rows.
    """
    tables = plan.read(rank=rank, world_size=world_size, start=start)
    size = max(1, TOKENS_PER_TASK // plan.max_length) if plan.max_length else ROWS_PER_TASK
    tasks = (table.slice(i, size) for table in tables for i in range(0, table.num_rows, size))
    pipelines = ThreadPoolExecutor(1, thread_name_prefix="medgpt-stream")
    begin = partial(_start_pipeline, tasks, data_url, plan.data_version, data_cpus)
    rows = _iterate_rows(pipelines, begin, pipelines.submit(begin))
    return _group_by_step(plan, rows, world_size=world_size, start=start)


def _group_by_step(
    plan: Plan, rows: Iterator[tuple[int, PackedRow]], *, world_size: int, start: int
) -> Iterator[StepRows]:
    pending = next(rows, None)
    for step in range(start, plan.num_steps):
        own_rows = []
        while pending is not None and pending[0] == step:
            own_rows.append(pending[1])
            pending = next(rows, None)
        num_rows = -(-plan.batch_rows(step) // world_size)
        yield StepRows(epoch=plan.epoch_of(step), step=step, rows=own_rows, num_rows=num_rows)
    assert pending is None, "the stream has rows of steps that are not in the plan"


def read_first_rows(
    plan: Plan, data_url: str, *, epoch: int, rank: int, world_size: int, limit: int
) -> list[PackedRow]:
    """Read a worker's share of the first `limit` rows of an epoch or of VALIDATION, without Ray."""
    table = plan.read_first(epoch, rank=rank, world_size=world_size, limit=limit)
    if not table.num_rows:
        return []
    split = "validation" if epoch == VALIDATION else "train"
    batch = assemble_rows(table, url=data_url, split=split, version=plan.data_version)
    return [row for _, row in unpack_rows(batch)]


@dataclass
class _Pipeline:
    """A Ray Data execution over a bounded part of the plan, which bounds its bookkeeping."""

    first_batch: pa.Table  # its arrival shows that reading has started
    batches: Iterator[pa.Table]
    num_tasks: int


def _start_pipeline(
    tasks: Iterator[pa.Table], data_url: str, version: str, data_cpus: float
) -> _Pipeline | None:
    """Start to read the next tasks and wait for the first batch. Returns None if none are left."""
    next_tasks = list(islice(tasks, TASKS_PER_PIPELINE))
    if not next_tasks:
        return None
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.custom_execution_callback_classes = [NoAutoscaling]
    # from_arrow would start a task with a CPU for each table, only to count its rows
    dataset = ray.data.from_blocks(next_tasks).map_batches(
        partial(assemble_rows, url=data_url, split="train", version=version),
        batch_format="pyarrow",
        batch_size=None,
        zero_copy_batch=True,
        num_cpus=data_cpus,
        # one is fast enough for a worker; Ray Data would submit as many as all CPUs of the cluster
        # could run, and an autoscaler would add nodes for those that wait
        compute=ray.data.TaskPoolStrategy(size=1),
        ray_remote_args_fn=_prefer_data_nodes,
    )
    batches = iter(
        dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
    )
    return _Pipeline(first_batch=next(batches), batches=batches, num_tasks=len(next_tasks))


def _prefer_data_nodes() -> dict[str, Any]:
    """Return Ray options that prefer nodes labeled role=data (see clusters/), else any node.

    Tasks on nodes of other groups would keep an autoscaler from removing them when idle. The
    explicit strategy keeps tasks out of the placement group of the caller.
    """
    return {
        "scheduling_strategy": "DEFAULT",
        "label_selector": {"role": "data"},
        "fallback_strategy": [{"label_selector": {}}],
    }


def _iterate_rows(
    pipelines: ThreadPoolExecutor,
    start: Callable[[], _Pipeline | None],
    current: Future[_Pipeline | None],
) -> Iterator[tuple[int, PackedRow]]:
    """Yield (step, row) of all pipelines; starts the next one when half of a pipeline is used."""
    while (pipeline := current.result()) is not None:
        next_pipeline = None
        for number, batch in enumerate(chain([pipeline.first_batch], pipeline.batches)):
            if number == pipeline.num_tasks // 2:
                next_pipeline = pipelines.submit(start)
            yield from unpack_rows(batch)
        current = next_pipeline or pipelines.submit(start)


def assemble_rows(plan: pa.Table, *, url: str, split: str, version: str) -> pa.Table:
    """Return packed rows: the plan rows in `plan` with the tokens of their chunks."""
    plan = plan.combine_chunks()
    start, stop = list_values(plan, "start"), list_values(plan, "stop")
    token_columns: dict[str, list[NDArray[Any]]] = {"input_ids": [], "targets": [], "word_ids": []}
    optional: dict[str, list[Any]] = {name: [] for name in OPTIONAL_COLUMNS}
    blocks = (read_block(url, split, int(number), version) for number in list_values(plan, "block"))
    for tokens, row, a, b in zip(blocks, list_values(plan, "row"), start, stop, strict=True):
        span = slice(tokens.offsets[row] + a, tokens.offsets[row] + b)
        token_columns["input_ids"].append(tokens.input_ids[span])
        token_columns["targets"].append(tokens.targets[span])
        if tokens.word_ids is not None:
            token_columns["word_ids"].append(tokens.word_ids[span])
        for name, values in tokens.optional.items():
            optional[name].append(values[row])
    lengths = stop - start
    rows = list_offsets(plan, "chunk")
    token_offsets = np.append(0, np.cumsum(lengths, dtype=np.int64))[rows]
    columns = {
        name: _list_array(token_offsets, np.concatenate(values))
        for name, values in token_columns.items()
        if values
    }
    plan_columns = {name: plan[name] for name in ("step", "chunk", "visit", "sample_id")}
    optional_columns = {
        name: pa.array(values, SHARD_SCHEMA.field(name).type) for name, values in optional.items()
    }
    optional_columns = {name: values for name, values in optional_columns.items() if len(values)}
    return pa.table(
        {**plan_columns, **columns, **optional_columns, "lengths": _list_array(rows, lengths)}
    )


def _list_array(bounds: NDArray[np.int64], values: NDArray[Any]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), pa.array(values))


def unpack_rows(batch: pa.Table) -> Iterator[tuple[int, PackedRow]]:
    """Yield (step, row) for every packed row of a batch."""
    batch = batch.combine_chunks()
    names = [name for name in batch.column_names if name not in ("step", "messages")]
    messages = batch["messages"].to_pylist() if "messages" in batch.column_names else None
    values = {name: list_values(batch, name) for name in names}
    bounds = {name: list_offsets(batch, name) for name in names}
    for i, step in enumerate(batch["step"].to_pylist()):
        cells = {n: values[n][bounds[n][i] : bounds[n][i + 1]] for n in names}
        yield (
            step,
            PackedRow(
                input_ids=cells["input_ids"],
                targets=cells["targets"],
                word_ids=cells.get("word_ids"),
                lengths=cells["lengths"],
                sample_ids=cells["sample_id"].tolist(),
                chunks=cells["chunk"].tolist(),
                repeat=cells["visit"].tolist(),
                sequence_lengths=cells.get("pieces"),
                grades=cells.get("grades"),
                messages=messages and messages[i],
            ),
        )

"""The training stream of one worker: the rows of its slots, from a step on, through Ray Data.

Which rows these are is written in the plan (plan.py), so a resumed stream starts anywhere at the
same cost, with any number of workers. Ray Data reads tokens ahead of the trainer, with
backpressure; what it moves are packed rows, each assembled once, on whichever node has a free CPU.
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

from medgpt.data.loader.order import VALIDATION
from medgpt.data.loader.packed_row import Row
from medgpt.data.loader.plan import Plan, column, offsets
from medgpt.data.loader.ray_internals import Modest
from medgpt.data.tokenized.shards import EXTRAS, SCHEMA, read_block

TOKENS_PER_TASK = 2**18  # a task costs Ray Data 20 ms and more, whatever it reads
ROWS_PER_TASK = 64  # where rows have no common length
TASKS_PER_PIPELINE = 64


@dataclass(frozen=True, kw_only=True)
class Step:
    """This worker's share of one optimizer step."""

    epoch: int
    step: int  # from 0, over all epochs
    rows: list[Row]  # of this worker, may be fewer than others have, even none
    num_rows: int  # of the worker with most


def training_stream(
    plan: Plan, data_url: str, *, rank: int, world_size: int, start: int, data_cpus: float = 1
) -> Iterator[Step]:
    """Steps from `start` to the end, in order, the same number on every worker.

    Reading starts at the call, because Ray Data takes seconds until the first rows come.
    """
    tables = plan.read(rank=rank, world_size=world_size, start=start)
    size = max(1, TOKENS_PER_TASK // plan.max_length) if plan.max_length else ROWS_PER_TASK
    tasks = chain.from_iterable(_tasks(table, size) for table in tables)
    pipelines = ThreadPoolExecutor(1, thread_name_prefix="medgpt-stream")
    begin = partial(_begin, tasks, data_url, plan.data_version, data_cpus)
    rows = _rows(pipelines, begin, pipelines.submit(begin))
    return _steps(plan, rows, world_size=world_size, start=start)


def _steps(
    plan: Plan, rows: Iterator[tuple[int, Row]], *, world_size: int, start: int
) -> Iterator[Step]:
    pending = next(rows, None)
    for step in range(start, plan.num_steps):
        mine = []
        while pending is not None and pending[0] == step:
            mine.append(pending[1])
            pending = next(rows, None)
        num_rows = -(-plan.batch_rows(step) // world_size)
        yield Step(epoch=plan.epoch_of(step), step=step, rows=mine, num_rows=num_rows)
    assert pending is None, "the stream holds rows of steps that are not in the plan"


def first_rows(
    plan: Plan, data_url: str, *, epoch: int, rank: int, world_size: int, limit: int
) -> list[Row]:
    """This worker's share of the first `limit` rows of an epoch, or of VALIDATION, the held-out
    split; it reads them itself."""
    table = plan.first(epoch, rank=rank, world_size=world_size, limit=limit)
    if not table.num_rows:
        return []
    split = "validation" if epoch == VALIDATION else "train"
    batch = assemble(table, url=data_url, split=split, version=plan.data_version)
    return [row for _, row in unpack(batch)]


@dataclass
class _Pipeline:
    """A Ray Data execution over a bounded part of the plan, so that its bookkeeping is bounded."""

    first: pa.Table  # its first batch, which says that the others are being read
    batches: Iterator[pa.Table]
    num_tasks: int


def _tasks(table: pa.Table, size: int) -> Iterator[pa.Table]:
    return (table.slice(i, size) for i in range(0, table.num_rows, size))


def _begin(
    tasks: Iterator[pa.Table], data_url: str, version: str, data_cpus: float
) -> _Pipeline | None:
    """Starts to read the next tasks; None if there are none left. Returns with the first batch."""
    part = list(islice(tasks, TASKS_PER_PIPELINE))
    if not part:
        return None
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.custom_execution_callback_classes = [Modest]
    # from_arrow would start a task of a CPU for each table, only to count its rows
    dataset = ray.data.from_blocks(part).map_batches(
        partial(assemble, url=data_url, split="train", version=version),
        batch_format="pyarrow",
        batch_size=None,
        zero_copy_batch=True,
        num_cpus=data_cpus,
        # one keeps ahead of a worker; Ray Data would submit as many as all CPUs could run if they
        # were free, and an autoscaler bring nodes for those that wait
        compute=ray.data.TaskPoolStrategy(size=1),
        ray_remote_args_fn=_on_data_nodes,
    )
    batches = iter(
        dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
    )
    return _Pipeline(first=next(batches), batches=batches, num_tasks=len(part))


def _on_data_nodes() -> dict[str, Any]:
    """Where a task goes: to nodes for data, as clusters/ labels them, if there is room, else
    anywhere. An autoscaler would keep idle nodes of other groups on which tasks run now and then.
    The strategy is said so that none is caught in the placement group of whoever reads."""
    return {
        "scheduling_strategy": "DEFAULT",
        "label_selector": {"role": "data"},
        "fallback_strategy": [{"label_selector": {}}],
    }


def _rows(
    pipelines: ThreadPoolExecutor,
    begin: Callable[[], _Pipeline | None],
    current: Future[_Pipeline | None],
) -> Iterator[tuple[int, Row]]:
    """(step, row) of all pipelines; the next one starts when half of the present one is used."""
    while (pipeline := current.result()) is not None:
        following = None
        for number, batch in enumerate(chain([pipeline.first], pipeline.batches)):
            if number == pipeline.num_tasks // 2:
                following = pipelines.submit(begin)
            yield from unpack(batch)
        current = following or pipelines.submit(begin)


def assemble(plan: pa.Table, *, url: str, split: str, version: str) -> pa.Table:
    """Plan rows in, packed rows out: the tokens of their chunks."""
    plan = plan.combine_chunks()
    start, stop = column(plan, "start"), column(plan, "stop")
    parts: dict[str, list[NDArray[Any]]] = {"input_ids": [], "targets": [], "word_ids": []}
    extras: dict[str, list[Any]] = {name: [] for name in EXTRAS}
    blocks = (read_block(url, split, int(number), version) for number in column(plan, "block"))
    for tokens, row, a, b in zip(blocks, column(plan, "row"), start, stop, strict=True):
        span = slice(tokens.offsets[row] + a, tokens.offsets[row] + b)
        parts["input_ids"].append(tokens.input_ids[span])
        parts["targets"].append(tokens.targets[span])
        if tokens.word_ids is not None:
            parts["word_ids"].append(tokens.word_ids[span])
        for name, values in tokens.extras.items():
            extras[name].append(values[row])
    lengths = stop - start
    rows = offsets(plan, "chunk")
    token_offsets = np.append(0, np.cumsum(lengths, dtype=np.int64))[rows]
    columns = {
        name: _lists(token_offsets, np.concatenate(values))
        for name, values in parts.items()
        if values
    }
    kept = {name: plan[name] for name in ("step", "chunk", "visit", "sample_id")}
    told = {name: pa.array(values, SCHEMA.field(name).type) for name, values in extras.items()}
    told = {name: values for name, values in told.items() if len(values)}
    return pa.table({**kept, **columns, **told, "lengths": _lists(rows, lengths)})


def _lists(bounds: NDArray[np.int64], values: NDArray[Any]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), pa.array(values))


def unpack(batch: pa.Table) -> Iterator[tuple[int, Row]]:
    """(step, row) of every packed row."""
    batch = batch.combine_chunks()
    names = [name for name in batch.column_names if name not in ("step", "messages")]
    messages = batch["messages"].to_pylist() if "messages" in batch.column_names else None
    values = {name: column(batch, name) for name in names}
    bounds = {name: offsets(batch, name) for name in names}
    for i, step in enumerate(batch["step"].to_pylist()):
        cut = {n: values[n][bounds[n][i] : bounds[n][i + 1]] for n in names}
        yield (
            step,
            Row(
                input_ids=cut["input_ids"],
                targets=cut["targets"],
                word_ids=cut.get("word_ids"),
                lengths=cut["lengths"],
                sample_ids=cut["sample_id"].tolist(),
                chunks=cut["chunk"].tolist(),
                repeat=cut["visit"].tolist(),
                pieces=cut.get("pieces"),
                grades=cut.get("grades"),
                messages=messages and messages[i],
            ),
        )

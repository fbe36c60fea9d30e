"""Training plan on disk: the packed rows of every epoch in training order, without tokens.

Written once, so that a restart reads only the rows that are left. One Parquet file per epoch, one
table row per packed row.
"""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from medgpt.artifacts import FileEntry, Folder, checksum, commit, committed
from medgpt.data.loader.epoch_order import VALIDATION, plan_epoch
from medgpt.data.loader.packing import PlannedRows
from medgpt.data.tokenized.index import SampleIndex
from medgpt.data.tokenized.shards import read_index

ROW_GROUP = 4096  # packed rows per Parquet row group
CHUNK_COLUMNS = ("block", "row", "start", "stop", "chunk", "visit")
PLAN_SCHEMA = pa.schema(
    {
        **{name: pa.list_(pa.int32()) for name in CHUNK_COLUMNS},
        "sample_id": pa.list_(pa.string()),
    }
)


class PlanSettings(NamedTuple):
    """Settings that determine the plan of a run, besides its data."""

    data_version: str  # shards.data_version
    max_length: int | None  # tokens of a packed row; None: one sample per row
    seed: int
    epochs: int
    weights: tuple[float, ...] | None  # per source
    max_rows: int | None  # planning stops at the epoch that reaches it
    packed: bool = True  # False: every chunk of at most max_length tokens has a row of its own

    def as_json(self) -> dict[str, Any]:
        values = {**self._asdict(), "weights": self.weights and list(self.weights)}
        if self.packed:
            del values["packed"]  # as in the plans that 0.2.0 wrote
        return values


def find_plan(url: str, settings: PlanSettings) -> dict[str, Any] | None:
    """Return the manifest of the plan at `url` if it was made with `settings`, else None."""
    manifest = committed(Folder(url))
    return manifest if manifest and manifest["made_of"] == settings.as_json() else None


def make_plan(url: str, data_url: str, settings: PlanSettings) -> None:
    """Write the plan of `settings` to `url`.

    Memory: the index of the corpus (about 100 bytes per sample) and one window of rows.
    """
    started_at = time.monotonic()
    folder = Folder(url)
    folder.remove()
    weights = None if settings.weights is None else np.array(settings.weights)
    index = read_index(Folder(data_url), "train")
    files: list[FileEntry] = []
    epochs: list[dict[str, int]] = []
    for epoch in range(settings.epochs):
        num_rows = sum(counts["num_rows"] for counts in epochs)
        if settings.max_rows is not None and num_rows >= settings.max_rows:
            break
        file, counts = _write_epoch(folder, index, settings, epoch, weights)
        files.append(file)
        epochs.append(counts)
    held_out = read_index(Folder(data_url), "validation")
    file, _ = _write_epoch(folder, held_out, settings, VALIDATION, None)
    seconds = time.monotonic() - started_at
    commit(folder, [*files, file], made_of=settings.as_json(), epochs=epochs, time_s=seconds)


def epoch_file(epoch: int) -> str:
    return "validation.parquet" if epoch == VALIDATION else f"epoch-{epoch:05d}.parquet"


def _write_epoch(
    folder: Folder,
    index: SampleIndex,
    settings: PlanSettings,
    epoch: int,
    weights: NDArray[np.float64] | None,
) -> tuple[FileEntry, dict[str, int]]:
    """Write the file of an epoch; returns it with its numbers of rows, chunks and tokens."""
    name, max_length = epoch_file(epoch), settings.max_length
    windows = plan_epoch(
        index,
        max_length=max_length,
        seed=settings.seed,
        epoch=epoch,
        weights=weights,
        packed=settings.packed,
    )
    counts = {"num_rows": 0, "num_chunks": 0, "num_tokens": 0}
    with folder.staging() as directory:
        path = directory / name
        with pq.ParquetWriter(path, PLAN_SCHEMA, compression="zstd") as writer:
            for rows in windows:
                writer.write_table(_rows_table(index, rows), row_group_size=ROW_GROUP)
                counts["num_rows"] += len(rows)
                counts["num_chunks"] += len(rows.chunk)
                counts["num_tokens"] += rows.num_tokens
        return FileEntry(name, path.stat().st_size, checksum(path)), counts


def _rows_table(index: SampleIndex, rows: PlannedRows) -> pa.Table:
    values = {
        "block": index.block[rows.sample],
        "row": index.row[rows.sample],
        "start": rows.start,
        "stop": rows.stop,
        "chunk": rows.chunk,
        "visit": rows.repeat,
    }
    columns = {name: pa.array(value.astype(np.int32)) for name, value in values.items()}
    columns["sample_id"] = pa.array(index.sample_id[rows.sample].astype(str), pa.string())
    offsets = pa.array(rows.bounds, pa.int32())
    return pa.table(
        {name: pa.ListArray.from_arrays(offsets, column) for name, column in columns.items()},
        schema=PLAN_SCHEMA,
    )


class Plan:
    """Reads the plan at `url`: the rows of each step and worker.

    Step k trains the next `global_batch_size` rows of its epoch; the last batch of an epoch may be
    smaller. Row i of a batch belongs to worker i mod world_size.
    """

    def __init__(self, url: str, *, global_batch_size: int, max_steps: int | None) -> None:
        manifest = committed(Folder(url))
        assert manifest is not None, f"{url} holds no plan"
        self.url, self.global_batch_size = url, global_batch_size
        self.data_version: str = manifest["made_of"]["data_version"]
        self.max_length: int | None = manifest["made_of"]["max_length"]
        self.num_rows: list[int] = [epoch["num_rows"] for epoch in manifest["epochs"]]
        steps = [-(-rows // global_batch_size) for rows in self.num_rows]
        self.first_step: list[int] = np.cumsum([0, *steps]).tolist()
        """(E + 1,) first step of each epoch, then the end."""
        self.num_steps = min(self.first_step[-1], max_steps or self.first_step[-1])

    def epoch_of(self, step: int) -> int:
        return int(np.searchsorted(self.first_step, step, side="right")) - 1

    def batch_rows(self, step: int) -> int:
        """Return the number of rows of the global batch."""
        epoch = self.epoch_of(step)
        done = (step - self.first_step[epoch]) * self.global_batch_size
        return min(self.global_batch_size, self.num_rows[epoch] - done)

    def read(self, *, rank: int, world_size: int, start: int) -> Iterator[pa.Table]:
        """Yield the rows of a worker from step `start` on, with a column `step`."""
        for epoch, first_step in enumerate(self.first_step[:-1]):
            end = min(self.first_step[epoch + 1], self.num_steps)
            if start >= end:
                continue
            first_row = max(0, start - first_step) * self.global_batch_size
            for first, table in self._read_row_groups(epoch_file(epoch), first_row):
                number = first + np.arange(table.num_rows)
                step = first_step + number // self.global_batch_size
                if step[0] >= end:
                    break
                slot = number % self.global_batch_size
                own_rows = np.flatnonzero(
                    (slot % world_size == rank) & (step >= start) & (step < end)
                )
                yield table.take(own_rows).append_column("step", pa.array(step[own_rows]))

    def read_first(self, epoch: int, *, rank: int, world_size: int, limit: int) -> pa.Table:
        """Return a worker's share of the first `limit` rows of an epoch or of VALIDATION."""
        row_groups = [table for _, table in self._read_row_groups(epoch_file(epoch), 0, limit)]
        table = pa.concat_tables(row_groups) if row_groups else PLAN_SCHEMA.empty_table()
        own_rows = np.arange(min(limit, table.num_rows))[rank::world_size]
        steps = pa.array(np.zeros(len(own_rows), np.int64))
        return table.take(own_rows).append_column("step", steps)

    def _read_row_groups(
        self, name: str, start: int, stop: int | None = None
    ) -> Iterator[tuple[int, pa.Table]]:
        """Yield row groups with rows in [start, stop), each with the number of its first row."""
        folder = Folder(self.url)
        with folder.fs.open(folder.path(name)) as handle:
            file = pq.ParquetFile(handle)
            groups = range(file.num_row_groups)
            ends = np.cumsum([file.metadata.row_group(group).num_rows for group in groups])
            for group in range(int(np.searchsorted(ends, start, side="right")), len(ends)):
                first = int(ends[group - 1]) if group else 0
                if stop is not None and first >= stop:
                    return
                yield first, file.read_row_group(group)


def list_values(table: pa.Table, name: str) -> NDArray[Any]:
    """Return the concatenated values of a list column."""
    return table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)


def list_offsets(table: pa.Table, name: str) -> NDArray[np.int64]:
    """Return the (R + 1,) offsets of a list column into its concatenated values."""
    return np.append(0, np.cumsum(table[name].combine_chunks().value_lengths().to_numpy()))

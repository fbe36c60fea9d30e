"""Records which chunk of which sample was trained in which step on which worker."""

from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq

from medgpt.artifacts import Folder
from medgpt.data.loader.stream import StepRows

SCHEMA = pa.schema(
    {
        "attempt": pa.int32(),
        "epoch": pa.int32(),
        "step": pa.int64(),
        "rank": pa.int32(),
        "sample_id": pa.string(),
        "chunk": pa.int32(),
    }
)


class Audit:
    """Collects the chunks of a worker's steps and writes them to audit/ of the run."""

    def __init__(self, folder: Folder, *, attempt: int, rank: int) -> None:
        self.folder, self.attempt, self.rank = folder, attempt, rank
        self.lines: list[dict[str, int | str]] = []

    def add(self, step: StepRows) -> None:
        for row in step.rows:
            self.add_chunks(step.epoch, step.step, zip(row.sample_ids, row.chunks, strict=True))

    def add_chunks(self, epoch: int, step: int, chunks: Iterable[tuple[str, int]]) -> None:
        """Record that `chunks`, pairs of sample id and chunk number, were trained in `step`."""
        key = {"attempt": self.attempt, "epoch": epoch, "step": step, "rank": self.rank}
        self.lines += [{**key, "sample_id": sample, "chunk": chunk} for sample, chunk in chunks]

    def take_lines(self) -> list[dict[str, int | str]]:
        """Return and forget the lines collected since the last call."""
        lines, self.lines = self.lines, []
        return lines

    def write(self, lines: list[dict[str, int | str]]) -> None:
        """Write `lines` as a parquet file atomically. Safe while another thread adds lines."""
        if not lines:
            return
        step = lines[-1]["step"]
        name = f"attempt-{self.attempt:04d}-rank-{self.rank:05d}-step-{step:08d}.parquet"
        with self.folder.staging() as directory:
            partial = directory / f".{name}"
            pq.write_table(pa.Table.from_pylist(lines, SCHEMA), partial)
            partial.replace(directory / name)

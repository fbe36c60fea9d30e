"""Reads the audit of a run."""

import pyarrow as pa
import pyarrow.parquet as pq

from medgpt.runs import Run

Chunk = tuple[str, int]


def effective_lines(run: Run) -> list[dict[str, int | str]]:
    """Return the lines of the highest attempt of each step, in training order."""
    folder = run.folder / "audit"
    complete_files = [name for name in folder.names() if not name.startswith(".")]
    tables = [pq.read_table(folder.path(name), filesystem=folder.fs) for name in complete_files]
    lines = pa.concat_tables(tables).to_pylist()
    newest_attempt: dict[tuple[int, int], int] = {}
    for line in lines:
        step = (line["epoch"], line["step"])
        newest_attempt[step] = max(newest_attempt.get(step, 0), line["attempt"])
    effective = [
        line for line in lines if line["attempt"] == newest_attempt[line["epoch"], line["step"]]
    ]
    return sorted(effective, key=lambda line: (line["step"], line["rank"]))


def chunks_by_epoch(run: Run) -> dict[int, list[Chunk]]:
    chunks: dict[int, list[Chunk]] = {}
    for line in effective_lines(run):
        chunks.setdefault(line["epoch"], []).append((line["sample_id"], line["chunk"]))
    return chunks


def assert_every_chunk_once(run: Run) -> None:
    """Assert that every epoch trained every chunk of every sample exactly once."""
    data, epochs, config = run.manifest["data"], chunks_by_epoch(run), run.config
    num_epochs = config["train"]["epochs"] if "train" in config else config["ppo"]["prompt_epochs"]
    assert sorted(epochs) == list(range(num_epochs))
    for chunks in epochs.values():
        assert len(chunks) == len(set(chunks)) == data["num_chunks"]
        assert len({sample for sample, _ in chunks}) == data["num_samples"]


def chunks_by_step(run: Run) -> dict[int, set[Chunk]]:
    """Return the chunks of every global batch."""
    chunks: dict[int, set[Chunk]] = {}
    for line in effective_lines(run):
        chunks.setdefault(line["step"], set()).add((line["sample_id"], line["chunk"]))
    return chunks

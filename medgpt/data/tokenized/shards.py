"""Tokenized samples on disk: Parquet shards, one row group per block, and their index."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from medgpt.artifacts import MANIFEST, FileEntry, Folder, checksum
from medgpt.data.sources.records import Origin
from medgpt.data.tokenized.index import SampleIndex

if TYPE_CHECKING:  # imports transformers, which would slow the start of every reading task
    from medgpt.data.tokenized.encode import EncodedSample

BLOCK_TOKENS = 1 << 18  # approximate tokens of a row group
CACHED_BLOCKS = 32  # more than a window has
ID_BYTES = 32  # hexadecimal characters of a hash
IDS_PER_CHUNK = 1 << 24
SHARD_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "targets": pa.list_(pa.bool_()),  # True where the loss counts
        "word_ids": pa.list_(pa.int32()),  # null without whole-word masking
        "pieces": pa.list_(pa.int32()),  # tokens per answer with its prompt; null without answers
        "grades": pa.list_(pa.float32()),  # grade of each answer; null without answers
        "messages": pa.string(),  # JSON of a prompt's messages; null otherwise
        "length": pa.int32(),
        "content_hash": pa.string(),
        "source": pa.int16(),
        "file": pa.string(),
        "row": pa.int64(),
    }
)
OPTIONAL_COLUMNS = ("pieces", "grades", "messages")
INDEX_SCHEMA = pa.schema(
    {
        "length": pa.int32(),
        "source": pa.int16(),
        "block": pa.int32(),
        "row": pa.int32(),
        "sample_id": pa.string(),
    }
)
BLOCKS_SCHEMA = pa.schema({"file": pa.string(), "row_group": pa.int32()})


class ShardWriter:
    """Context manager that appends samples to one shard.

    The file appears once it is complete, so two tasks may write the same shard.
    """

    def __init__(self, folder: Folder, name: str) -> None:
        self.name = name
        self.files: list[FileEntry] = []  # after `with`: the shard, if it has samples
        self.pending: list[dict[str, Any]] = []
        self.pending_tokens = 0
        self.writer: pq.ParquetWriter | None = None
        self.stack = ExitStack()
        directory = self.stack.enter_context(folder.staging())
        self.path, self.partial = directory / name, directory / f".{name}.{uuid4().hex}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            if exception == (None, None, None):
                self._finish()
        finally:
            if self.writer is not None:
                self.writer.close()
            self.partial.unlink(missing_ok=True)
            self.stack.__exit__(*exception)

    def add(
        self, encoded: "EncodedSample", *, content_hash: str, source: int, origin: Origin
    ) -> None:
        self.pending.append(
            {
                "input_ids": encoded.input_ids,
                "targets": encoded.targets,
                "word_ids": encoded.word_ids,
                "pieces": encoded.sequence_lengths,
                "grades": encoded.grades,
                "messages": encoded.messages,
                "length": len(encoded.input_ids),
                "content_hash": content_hash,
                "source": source,
                "file": origin.file,
                "row": origin.row,
            }
        )
        self.pending_tokens += len(encoded.input_ids)
        if self.pending_tokens >= BLOCK_TOKENS:
            self._flush()

    def _finish(self) -> None:
        if self.pending:
            self._flush()
        if self.writer is not None:
            self.writer.close()
            size, digest = self.partial.stat().st_size, checksum(self.partial)
            self.files = [FileEntry(self.name, size, digest)]
            self.partial.replace(self.path)

    def _flush(self) -> None:
        if self.writer is None:
            self.writer = pq.ParquetWriter(self.partial, SHARD_SCHEMA, compression="zstd")
        self.writer.write_table(pa.Table.from_pylist(self.pending, SHARD_SCHEMA))
        self.pending, self.pending_tokens = [], 0


def write_index(folder: Folder, split: str, shards: Sequence[str]) -> list[FileEntry]:
    """Write the index of a split over its shards, in their order. Reads no tokens."""
    columns = ["length", "source", "content_hash"]
    tables, blocks = [], []
    for name in shards:
        with folder.fs.open(folder.path(name)) as file:
            shard = pq.ParquetFile(file)
            sizes = [shard.metadata.row_group(g).num_rows for g in range(shard.num_row_groups)]
            rows = [np.arange(size) for size in sizes]
            numbers = [np.full(size, len(blocks) + g) for g, size in enumerate(sizes)]
            table = shard.read(columns=columns)
        table = table.append_column("block", pa.array(np.concatenate(numbers), pa.int32()))
        tables.append(table.append_column("row", pa.array(np.concatenate(rows), pa.int32())))
        blocks += [{"file": name, "row_group": g} for g in range(len(sizes))]
    index = pa.concat_tables(tables) if tables else _empty_index()
    ids = make_sample_ids(fixed_width_ids(index["content_hash"]))
    index = index.append_column("sample_id", id_column(ids)).select(INDEX_SCHEMA.names)
    files = []
    with folder.staging() as directory:
        for name, content in (
            (f"{split}.index.parquet", index),
            (f"{split}.blocks.parquet", pa.Table.from_pylist(blocks, BLOCKS_SCHEMA)),
        ):
            pq.write_table(content, directory / name, compression="zstd")
            size = (directory / name).stat().st_size
            files.append(FileEntry(name, size, checksum(directory / name)))
    return files


def _empty_index() -> pa.Table:
    schema = INDEX_SCHEMA.remove(INDEX_SCHEMA.get_field_index("sample_id"))
    return schema.append(pa.field("content_hash", pa.string())).empty_table()


def make_sample_ids(hashes: NDArray[np.bytes_]) -> NDArray[np.bytes_]:
    """Return (N,) hashes of content hash and occurrence number, unique even for equal contents.

    Uses arrays of 32 bytes per sample, no Python objects: a corpus may have many short samples.
    """
    by_hash = np.argsort(hashes, kind="stable")
    position, ordered = np.arange(len(hashes)), hashes[by_hash]
    is_repeat = np.append(False, ordered[1:] == ordered[:-1])[: len(hashes)]
    occurrence = np.empty_like(position)
    occurrence[by_hash] = position - np.maximum.accumulate(np.where(is_repeat, 0, position))
    return np.fromiter(
        (
            xxhash.xxh3_128_hexdigest(b"%b:%d" % pair).encode()
            for pair in zip(hashes, occurrence, strict=True)
        ),
        dtype="S32",
        count=len(hashes),
    )


def id_column(ids: NDArray[np.bytes_], *, per_chunk: int = IDS_PER_CHUNK) -> pa.ChunkedArray:
    """Return (N,) ids as strings, in chunks: one holds less than 2 GiB of text, 67,108,863 ids."""
    starts = range(0, len(ids), per_chunk)
    chunks = [pa.array(ids[i : i + per_chunk]).cast(pa.string()) for i in starts]
    return pa.chunked_array(chunks, pa.string())


def fixed_width_ids(column: pa.ChunkedArray) -> NDArray[np.bytes_]:
    """Return a column of 32 characters as an (N,) array of S32."""
    ids, start = np.empty(len(column), f"S{ID_BYTES}"), 0
    for chunk in column.chunks:  # a single array would hold no more than 2 GiB
        values = chunk.cast(pa.binary()).cast(pa.binary(ID_BYTES))
        stop, offset = start + len(values), ID_BYTES * values.offset
        ids[start:stop] = np.frombuffer(values.buffers()[1], ids.dtype, len(values), offset)
        start = stop
    return ids


def read_index(folder: Folder, split: str) -> SampleIndex:
    """Read the index of a split."""
    with folder.fs.open(folder.path(f"{split}.index.parquet")) as file:
        table = pq.read_table(file)
    columns = {
        name: table[name].to_numpy().astype(np.int64)
        for name in ("length", "source", "block", "row")
    }
    return SampleIndex(**columns, sample_id=fixed_width_ids(table["sample_id"]))


def data_version(url: str) -> str:
    """Return a hash of the manifest, a cache key that changes when the shards are rewritten."""
    return xxhash.xxh3_64_hexdigest(Folder(url).read_text(MANIFEST).encode())


class BlockTokens(NamedTuple):
    """The R samples of a block. Sample i is values[offsets[i]:offsets[i + 1]]."""

    offsets: NDArray[np.int64]
    input_ids: NDArray[np.int32]
    targets: NDArray[np.bool_]
    word_ids: NDArray[np.int32] | None
    optional: dict[str, list[Any]]
    """Column name -> (R,) values: `pieces` and `grades` of answers, `messages` of prompts. Without
    columns that are null."""


@lru_cache(maxsize=CACHED_BLOCKS)
def read_block(url: str, split: str, block: int, version: str) -> BlockTokens:
    """Read the tokens of one block. Caches recent blocks by the version of their data."""
    folder = Folder(url)
    file, row_group = _read_block_locations(url, split, version)[block]
    with folder.fs.open(folder.path(file)) as handle:
        table = pq.ParquetFile(handle).read_row_group(
            row_group, columns=["input_ids", "targets", "word_ids", *OPTIONAL_COLUMNS]
        )
    lists = {name: table[name].combine_chunks() for name in table.column_names}
    word_ids = lists["word_ids"]
    optional = [name for name in OPTIONAL_COLUMNS if not table[name].null_count]
    return BlockTokens(
        offsets=lists["input_ids"].offsets.to_numpy().astype(np.int64),
        input_ids=lists["input_ids"].flatten().to_numpy(),
        targets=lists["targets"].flatten().to_numpy(zero_copy_only=False),
        word_ids=None if word_ids.null_count else word_ids.flatten().to_numpy(),
        optional={name: table[name].to_pylist() for name in optional},
    )


@lru_cache(maxsize=4)
def _read_block_locations(url: str, split: str, version: str) -> list[tuple[str, int]]:
    folder = Folder(url)
    with folder.fs.open(folder.path(f"{split}.blocks.parquet")) as file:
        table = pq.read_table(file)
    return list(zip(table["file"].to_pylist(), table["row_group"].to_pylist(), strict=True))

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from medgpt.artifacts import FileEntry, Folder, commit, committed
from medgpt.data.sources.records import Origin
from medgpt.data.tokenized.encode import EncodedSample
from medgpt.data.tokenized.shards import (
    BLOCK_TOKENS,
    IDS_PER_CHUNK,
    INDEX_SCHEMA,
    ShardWriter,
    data_version,
    fixed_width_ids,
    id_column,
    make_sample_ids,
    read_block,
    read_index,
    write_index,
)

ORIGIN = Origin(source="s", file="f.jsonl", row=1)


def encoded(ids: Sequence[int], *, word_ids: Sequence[int] | None = None) -> EncodedSample:
    return EncodedSample(
        input_ids=np.array(ids, np.int32),
        targets=np.array(ids) % 2 == 0,
        word_ids=None if word_ids is None else np.array(word_ids, np.int32),
    )


def write(folder: Folder, name: str, samples: Sequence[EncodedSample]) -> list[FileEntry]:
    with ShardWriter(folder, name) as writer:
        for i, sample in enumerate(samples):
            writer.add(sample, content_hash=f"{i:032x}", source=0, origin=ORIGIN)
    return writer.files


def test_tokens_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    shards = [[encoded([1, 2, 3]), encoded([4])], [encoded([5, 6])]]
    files = [f for i, s in enumerate(shards) for f in write(folder, f"train-{i}.parquet", s)]
    files += write_index(folder, "train", [file.name for file in files])
    commit(folder, files)
    assert committed(folder, verify=True)
    index = read_index(folder, "train")
    assert index.length.tolist() == [3, 1, 2]
    assert index.block.tolist() == [0, 0, 1]
    assert index.row.tolist() == [0, 1, 0]
    block = read_block(folder.url, "train", 0, data_version(folder.url))
    assert block.offsets.tolist() == [0, 3, 4]
    assert block.input_ids.tolist() == [1, 2, 3, 4]
    assert block.targets.tolist() == [False, True, False, True]
    assert block.word_ids is None


def test_optional_columns_are_read_back(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    several = replace(
        encoded([1, 2, 3]),
        sequence_lengths=np.array([2, 1], np.int32),
        grades=np.array([1, 0.5], np.float32),
    )
    prompts = [replace(encoded([n]), messages=f'[["user", "{n}"]]') for n in (1, 2)]
    for name, samples, extras in (
        ("train", [several], {"pieces": [[2, 1]], "grades": [[1.0, 0.5]]}),
        ("validation", prompts, {"messages": ['[["user", "1"]]', '[["user", "2"]]']}),
    ):
        files = write(folder, f"{name}-0.parquet", samples)
        write_index(folder, name, [file.name for file in files])
        assert read_block(folder.url, name, 0, "v").optional == extras


def test_word_ids_are_read_back(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    files = write(folder, "train-0.parquet", [encoded([1, 2], word_ids=[-1, 7])])
    commit(folder, files + write_index(folder, "train", ["train-0.parquet"]))
    words = read_block(folder.url, "train", 0, data_version(folder.url)).word_ids
    assert words is not None
    assert words.tolist() == [-1, 7]


def test_a_block_holds_a_bounded_number_of_tokens(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    third = encoded(range(BLOCK_TOKENS // 3 + 1))
    write(folder, "train-0.parquet", [third] * 7)
    write_index(folder, "train", ["train-0.parquet"])
    assert read_index(folder, "train").block.tolist() == [0, 0, 0, 1, 1, 1, 2]


def test_a_split_without_samples_has_an_empty_index_and_no_shard(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    assert write(folder, "validation-0.parquet", []) == []
    write_index(folder, "validation", [])
    assert len(read_index(folder, "validation")) == 0
    assert folder.names() == ["validation.blocks.parquet", "validation.index.parquet"]


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    broken = replace(encoded([1]), targets=np.array(["text"]))
    samples = [encoded(range(BLOCK_TOKENS)), broken]  # the first fills a block
    with pytest.raises(pa.ArrowInvalid):
        write(folder, "train-0.parquet", samples)
    assert folder.names() == []


@pytest.mark.parametrize("second_fails", [True, False])
def test_two_tasks_may_write_the_same_shard_at_once(tmp_path: Path, second_fails: bool) -> None:
    folder = Folder(str(tmp_path))
    sample = encoded(range(BLOCK_TOKENS))
    late = ShardWriter(folder, "train-0.parquet")
    late.add(sample, content_hash="0", source=0, origin=ORIGIN)
    with ShardWriter(folder, "train-0.parquet") as writer:
        writer.add(sample, content_hash="0", source=0, origin=ORIGIN)
    commit(folder, writer.files)
    if second_fails:
        late.__exit__(OSError, OSError(), None)
    else:
        late.__exit__(None, None, None)
        assert late.files == writer.files
    assert committed(folder, verify=True)
    assert folder.names() == ["manifest.json", "train-0.parquet"]


def test_shards_can_live_behind_a_uri() -> None:
    folder = Folder("memory://shards/data")
    files = write(folder, "train-0.parquet", [encoded([1, 2, 3])])
    commit(folder, files + write_index(folder, "train", ["train-0.parquet"]))
    assert committed(folder, verify=True)
    block = read_block(folder.url, "train", 0, data_version(folder.url))
    assert block.input_ids.tolist() == [1, 2, 3]
    folder.remove()


def test_rewritten_shards_are_not_read_from_the_cache(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    seen = []
    for ids in ([1, 2], [3, 4]):
        files = write(folder, "train-0.parquet", [encoded(ids)])
        commit(folder, files + write_index(folder, "train", ["train-0.parquet"]))
        block = read_block(folder.url, "train", 0, data_version(folder.url))
        seen.append(block.input_ids.tolist())
    assert seen == [[1, 2], [3, 4]]


def test_sample_ids_of_equal_contents_differ_and_do_not_depend_on_the_order() -> None:
    ids = make_sample_ids(np.array([b"a", b"b", b"a", b"a"])).tolist()
    assert len(set(ids)) == 4
    assert set(make_sample_ids(np.array([b"a", b"a", b"b", b"a"])).tolist()) == set(ids)
    assert make_sample_ids(np.array([b"a"])).tolist() == ids[:1]
    assert ids[2] == xxhash.xxh3_128_hexdigest(b"a:1").encode()


def repeated_ids(num_ids: int) -> pa.ChunkedArray:
    """Return a column of ids that holds the same 50,000 again and again."""
    some = pa.array([f"{number:032x}" for number in range(50_000)])
    return pa.chunked_array([*[some] * (num_ids // 50_000), some.slice(7, num_ids % 50_000)])


@pytest.mark.parametrize(
    ("num_ids", "per_chunk"),
    [(110_000, 7_000), pytest.param(67_108_865, IDS_PER_CHUNK, marks=pytest.mark.slow)],
)
def test_ids_of_more_than_one_chunk_are_written_and_read(
    tmp_path: Path, num_ids: int, per_chunk: int
) -> None:
    ids = fixed_width_ids(repeated_ids(num_ids))  # the slow ones are more than 2 GiB
    assert ids.nbytes == 32 * num_ids
    assert ids[[0, 50_000, 99_999]].tolist() == [b"%032x" % n for n in (0, 0, 49_999)]
    assert ids[-1] == b"%032x" % (7 + num_ids % 50_000 - 1)
    column = id_column(ids, per_chunk=per_chunk)
    pq.write_table(pa.table({"sample_id": column}), tmp_path / "index.parquet")
    read = pq.read_table(tmp_path / "index.parquet")["sample_id"]
    assert read.type == pa.string()  # as runs of earlier versions have it
    assert np.array_equal(fixed_width_ids(read), ids)


def test_an_index_that_an_earlier_version_wrote_is_read(tmp_path: Path) -> None:
    ids = [f"{number:032x}" for number in range(3)]
    numbers = {name: [0, 1, 2] for name in ("length", "source", "block", "row")}
    table = pa.table({**numbers, "sample_id": ids}, schema=INDEX_SCHEMA)
    pq.write_table(table, tmp_path / "train.index.parquet", compression="zstd")
    index = read_index(Folder(str(tmp_path)), "train")
    assert index.sample_id.tolist() == [each.encode() for each in ids]
    assert index.row.tolist() == [0, 1, 2]

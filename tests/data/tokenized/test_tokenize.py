import gzip
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medgpt.artifacts import Folder, committed
from medgpt.config.base import ConfigError
from medgpt.config.data import DataConfig
from medgpt.data.sources.inputs import check_sources
from medgpt.data.sources.records import Document, Record, Reject
from medgpt.data.tokenized import tokenize as tokenize_module
from medgpt.data.tokenized.encode import EncodedSample
from medgpt.data.tokenized.shards import data_version, read_block, read_index
from medgpt.data.tokenized.tokenize import (
    EncodeBatch,
    TokenizeJob,
    commit_shards,
    finished_slices,
    list_all_slices,
    prepare_folders,
    reusable_manifest,
    tokenize_slice,
    tokenize_sources,
)

SECRET = "张三的病历"


def encode(records: Sequence[Record]) -> list[EncodedSample | Reject]:
    """One token per character; sets aside texts over 400 characters."""
    results: list[EncodedSample | Reject] = []
    for record in records:
        text = (
            record.text
            if isinstance(record, Document)
            else "".join(message.content for message in record.messages)
        )
        origin = {"source": record.source, "file": record.file, "row": record.row}
        if len(text) > 400:
            reason = f"{len(text)} characters are too long"
            results.append(Reject(**origin, reason=reason, malformed=False))
            continue
        ids = np.array([ord(character) for character in text], np.int32)
        results.append(EncodedSample(input_ids=ids, targets=np.ones(len(ids), np.bool_)))
    return results


def make_encode() -> EncodeBatch:
    return encode


def refuse_to_encode() -> EncodeBatch:
    raise ConfigError("objective.kind=clm: the tokenizer has no end token")


def make_job(
    folder: Path, *sources: dict[str, Any], allow_changes: bool = False, **data: Any
) -> TokenizeJob:
    defaults = {"license": "MIT", "deny": []}
    tree = {"sources": [{**defaults, **source} for source in sources], "max_length": 64, **data}
    return TokenizeJob(
        data_url=str(folder / "run/data"),
        rejected_url=str(folder / "run/rejected"),
        config=DataConfig.model_validate(tree),
        encoding={"tokenizer": "characters"},
        make_encode=make_encode,
        allow_changes=allow_changes,
    )


def tokenize(job: TokenizeJob) -> dict[str, Any]:
    """`tokenize_sources` in this process, without Ray."""
    check_sources(job.config)
    if manifest := reusable_manifest(job):
        return manifest
    slices = list_all_slices(job.config)
    stamps = prepare_folders(job)
    results = [
        tokenize_slice(file_slice, number, job=job) for number, file_slice in enumerate(slices)
    ]
    results = json.loads(json.dumps(results))
    return commit_shards(job, slices, results, stamps, started_at=time.monotonic())


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return path


def texts(number: int, start: int = 0) -> list[dict[str, str]]:
    return [{"text": f"document {i}"} for i in range(start, start + number)]


def ids_of(job: TokenizeJob, split: str = "train") -> list[bytes]:
    return read_index(Folder(job.data_url), split).sample_id.tolist()


def documents(job: TokenizeJob, split: str = "train") -> list[str]:
    """The texts in the shards, in the order of the index."""
    entries = read_index(Folder(job.data_url), split)
    texts_by_row = []
    for number, row in zip(entries.block.tolist(), entries.row.tolist(), strict=True):
        block = read_block(job.data_url, split, number, data_version(job.data_url))
        span = slice(block.offsets[row], block.offsets[row + 1])
        texts_by_row.append("".join(map(chr, block.input_ids[span])))
    return texts_by_row


def test_preferences_about_one_prompt_stay_whole_and_on_one_side(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{number:03d}", "chosen": "x" * 100, "rejected": f"{pair}"}
        for number in range(100)
        for pair in range(2)
    ]
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    source = {"name": "pairs", "paths": [str(path)]}
    packed = make_job(tmp_path, source, validation_share=0.3)
    job = TokenizeJob(**{**vars(packed), "packing": False})

    manifest = tokenize(job)

    train, held_out = ([text[:3] for text in documents(job, s)] for s in ("train", "validation"))
    assert not set(train) & set(held_out)
    assert all(train.count(prompt) == 2 for prompt in train)
    assert 20 < len(held_out) < 100
    assert len(set(ids_of(job))) == manifest["num_samples"] == len(train)
    assert manifest["num_chunks"] == len(train)  # although each is longer than max_length


def test_every_row_is_trained_held_out_or_set_aside_with_its_reason(tmp_path: Path) -> None:
    malformed = [{"text": ""}, {"wrong": SECRET}, [SECRET]]
    long = {"text": SECRET * 100}
    write_lines(tmp_path / "a/0.jsonl", [*texts(200), *malformed, long])
    write_lines(tmp_path / "a/1.jsonl", [*texts(100, 200), *malformed[:1]])
    write_lines(tmp_path / "b.jsonl", texts(50, 500))
    job = make_job(
        tmp_path,
        {"name": "a", "paths": [str(tmp_path / "a")], "sensitive": True},
        {"name": "b", "paths": [str(tmp_path / "b.jsonl")], "license": "CC0-1.0"},
        validation_share=0.2,
        max_malformed_share=0.05,
    )
    manifest = tokenize(job)
    a, b = manifest["sources"]["a"], manifest["sources"]["b"]
    assert (a["licence"], a["sensitive"], b["licence"], b["sensitive"]) == (
        ("MIT", True, "CC0-1.0", False)
    )
    assert (a["rows"], a["malformed"], sum(a["set_aside"].values())) == (305, 4, 5)
    assert a["train"] + a["validation"] == 300
    assert a["validation"] > 30
    assert (b["rows"], b["set_aside"]) == (50, {})
    assert "N characters are too long" in a["set_aside"]
    assert manifest["num_samples"] == a["train"] + b["train"]
    assert manifest["validation"]["num_samples"] == a["validation"] + b["validation"]
    all_documents = documents(job) + documents(job, "validation")
    assert sorted(all_documents) == sorted(row["text"] for row in texts(300) + texts(50, 500))
    assert manifest["num_tokens"] == sum(map(len, documents(job)))
    assert sum(manifest["tokens_by_source"].values()) == manifest["num_tokens"]
    assert manifest["dropped_tail_tokens"] == 0


def test_rejected_rows_are_named_but_not_quoted_in_a_folder_of_the_owner(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [*texts(3), {"wrong": SECRET}, {"text": SECRET * 99}])
    job = make_job(
        tmp_path, {"name": "a", "paths": [str(path)]}, max_malformed_share=0.5, validation_share=0
    )
    tokenize(job)
    folder = Path(job.rejected_url)
    assert folder.stat().st_mode & 0o777 == 0o700
    text = (folder / "unit-00000.jsonl").read_text("utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert {(line["file"], line["row"]) for line in lines} == {(str(path), 4), (str(path), 5)}
    assert all(line["reason"] for line in lines)
    assert SECRET not in text


def test_too_many_malformed_rows_stop_the_run_and_point_to_them(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [*texts(98), {"text": ""}, {"wrong": SECRET}])
    source = {"name": "a", "paths": [str(path)]}
    with pytest.raises(ConfigError, match=r"a: 2 of 100 rows .*max_malformed_share=0.01") as error:
        tokenize(make_job(tmp_path, source))
    assert str(tmp_path / "run/rejected") in str(error.value)
    assert SECRET not in str(error.value)
    assert committed(Folder(str(tmp_path / "run/data"))) is None
    assert (
        tokenize(make_job(tmp_path, source, max_malformed_share=0.02))["sources"]["a"]["rows"]
        == 100
    )


def test_tokenizing_again_removes_all_earlier_files(tmp_path: Path) -> None:
    for shard in range(3):
        write_lines(tmp_path / f"a/{shard}.jsonl", [*texts(9, 10 * shard), {"text": ""}])
    source = {"name": "a", "paths": [str(tmp_path / "a")]}
    with pytest.raises(ConfigError, match="malformed"):
        tokenize(make_job(tmp_path, source, validation_share=0))
    (tmp_path / "a/2.jsonl").unlink()
    write_lines(tmp_path / "a/1.jsonl", texts(9, 10))
    job = make_job(tmp_path, source, validation_share=0, max_malformed_share=0.1)
    tokenize(job)
    assert Folder(job.rejected_url).names() == ["unit-00000.jsonl"]
    shards = [name for name in Folder(job.data_url).names() if name.startswith("train-")]
    assert shards == ["train-00000.parquet", "train-00001.parquet"]


def test_a_repeated_slice_rewrites_the_same_shard(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", texts(100))
    job = make_job(tmp_path, {"name": "a", "paths": [str(path)]})
    manifest = tokenize(job)
    repeated = tokenize_slice(list_all_slices(job.config)[0], 0, job=job)
    assert repeated["files"] == [
        f for f in manifest["files"] if f["name"] in str(repeated["files"])
    ]
    assert committed(Folder(job.data_url), verify=True)


def test_sample_ids_depend_neither_on_files_nor_on_slices(tmp_path: Path) -> None:
    rows = [{"text": f"document {i % 9000} {'x' * 200}"} for i in range(12_000)]
    one_file = write_lines(tmp_path / "one/0.jsonl", rows)
    for shard in range(5):
        write_lines(tmp_path / f"many/{shard}.jsonl", rows[shard::5])
    ids_of_splits = []
    for paths, shard_mb in ((one_file, 32), (one_file, 1), (tmp_path / "many", 32)):
        source = {"name": "a", "paths": [str(paths)]}
        job = make_job(
            tmp_path / str(len(ids_of_splits)), source, shard_mb=shard_mb, validation_share=0.1
        )
        tokenize(job)
        ids_of_splits.append([sorted(ids_of(job, split)) for split in ("train", "validation")])
        all_ids = [name for split in ids_of_splits[-1] for name in split]
        assert len(set(all_ids)) == len(all_ids) == 12_000
    assert ids_of_splits[0] == ids_of_splits[1] == ids_of_splits[2]
    assert len(list_all_slices(make_job(tmp_path, source, shard_mb=1).config)) == 5
    assert (
        len(
            list_all_slices(
                make_job(tmp_path, {**source, "paths": [str(one_file)]}, shard_mb=1).config
            )
        )
        > 1
    )


def test_equal_contents_fall_on_the_same_side(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", texts(200) * 3)
    job = make_job(tmp_path, {"name": "a", "paths": [str(path)]}, validation_share=0.3)
    tokenize(job)
    train, validation = set(documents(job)), set(documents(job, "validation"))
    assert not train & validation
    assert 30 < len(validation) < 90


def test_trimmed_turns_are_counted(tmp_path: Path) -> None:
    turns = ["assistant", "user", "assistant", "user"]
    talk = {"turns": [{"role": role, "content": f"{role} says"} for role in turns]}
    path = write_lines(tmp_path / "a.jsonl", [talk] * 3)
    mapping = {"turns": {"column": "turns", "trim": True}}
    source = {"name": "a", "paths": [str(path)], "mapping": mapping}
    counts = tokenize(make_job(tmp_path, source, validation_share=0))["sources"]["a"]
    assert (counts["train"], counts["trimmed_turns"]) == (3, 6)


def test_columns_and_keys_that_nothing_read_are_counted(tmp_path: Path) -> None:
    rows = [{"text": f"document {i}", "id": i, "images": ["x.png"]} for i in range(3)]
    rows += [{"text": "one", f"key {i}": 1} for i in range(60)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    source = {"name": "a", "paths": [str(path)], "ignore": ["images"]}
    unused = tokenize(make_job(tmp_path, source, validation_share=0))["sources"]["a"]["unused"]
    assert (unused["column id"], unused["column images"]) == (3, 3)
    assert len(unused) == 51
    assert unused["other columns and keys"] == 12


def test_an_empty_training_split_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "x" * 500}] * 3)
    with pytest.raises(ConfigError, match=r"no row is left .*N characters are too long \(3 rows\)"):
        tokenize(make_job(tmp_path, {"name": "a", "paths": [str(path)]}))


def test_a_weighted_source_without_rows_is_an_error(tmp_path: Path) -> None:
    good = write_lines(tmp_path / "a.jsonl", texts(9))
    empty = write_lines(tmp_path / "b.jsonl", [{"text": "x" * 500}])
    sources = [{"name": "a", "paths": [str(good)]}, {"name": "b", "paths": [str(empty)]}]
    tokenize(make_job(tmp_path, *sources, validation_share=0))
    weighted = [{**source, "weight": 1} for source in sources]
    for folder in (tmp_path, tmp_path / "fresh"):  # finished work is checked again
        with pytest.raises(ConfigError, match=r"data.sources b weight=1: no row of it is left"):
            tokenize(make_job(folder, *weighted, validation_share=0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paths": ["absent.jsonl"]}, "absent.jsonl"),
        ({"mapping": {"text": "{{ text"}}, "not a Jinja template"),
        ({"deny": ["absent.toml"]}, "no such file"),
    ],
)
def test_a_wrong_source_is_an_error_before_any_task_starts(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", texts(1))
    job = make_job(tmp_path, {"name": "a", "paths": [str(path)], **changes})
    with pytest.raises(ConfigError, match=message):
        tokenize_sources(job, data_cpus=1, on_progress=lambda done, total: None)


# unreadable files


def broken_parquet(folder: Path) -> Path:
    """Two good shards and a truncated one."""
    folder.mkdir(exist_ok=True)
    path = folder / "2.parquet"
    for shard in range(3):
        table = pa.Table.from_pylist(texts(50, 100 * shard))
        pq.write_table(table, folder / f"{shard}.parquet")
    path.write_bytes(path.read_bytes()[:-200])
    return path


def broken_gzip(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "2.jsonl.gz"
    for shard in range(3):
        lines = "".join(json.dumps(row) + "\n" for row in texts(5000, 10_000 * shard))
        (folder / f"{shard}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    path.write_bytes(path.read_bytes()[:-4000])
    return path


@pytest.mark.parametrize("make", [broken_parquet, broken_gzip])
def test_a_truncated_shard_among_good_ones_stops_the_run_unless_it_is_accepted(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    path = make(tmp_path / "a")
    source = {"name": "a", "paths": [str(tmp_path / "a")]}
    with pytest.raises(ConfigError, match="1 of 3 pieces of files cannot be read") as error:
        tokenize(make_job(tmp_path, source))
    assert str(path) in str(error.value)
    assert "0.34" in str(error.value)
    job = make_job(tmp_path, source, max_malformed_share=0.34, validation_share=0)
    account = tokenize(job)["sources"]["a"]
    assert len(account["unreadable_files"]) == 1
    assert account["unreadable_files"][0].startswith(f"{path}, row ")
    good = 100 if make is broken_parquet else 10_000
    assert good <= account["train"] == account["rows"] - 1


# resuming and reusing earlier work


def three_files(tmp_path: Path) -> tuple[TokenizeJob, dict[str, Any]]:
    for shard in range(3):
        write_lines(tmp_path / f"a/{shard}.jsonl", texts(20, 20 * shard))
    job = make_job(tmp_path, {"name": "a", "paths": [str(tmp_path / "a")]}, validation_share=0)
    return job, tokenize(job)


def test_finished_work_is_reused(tmp_path: Path) -> None:
    job, manifest = three_files(tmp_path)
    assert reusable_manifest(job) == manifest
    assert [Path(entry["file"]).name for entry in manifest["inputs"]] == [
        "0.jsonl",
        "1.jsonl",
        "2.jsonl",
    ]


def test_work_of_a_version_without_the_newer_keys_is_reused(tmp_path: Path) -> None:
    job, manifest = three_files(tmp_path)
    for source in manifest["config"]["sources"]:
        del source["ignore"]
    for source in manifest["sources"].values():
        del source["unused"]
    Folder(job.data_url).write_json("manifest.json", manifest)
    assert reusable_manifest(job) == manifest


def test_files_with_another_date_but_the_same_content_are_the_same(tmp_path: Path) -> None:
    job, manifest = three_files(tmp_path)
    copied = tmp_path / "a/1.jsonl"
    text = copied.read_text("utf-8")
    copied.unlink()
    copied.write_text(text, "utf-8")
    os.utime(copied, (0, 0))
    assert reusable_manifest(job) == manifest


def edit(folder: Path) -> None:
    write_lines(folder / "1.jsonl", texts(20, 900))


def append(folder: Path) -> None:
    write_lines(folder / "1.jsonl", texts(21, 20))


def remove(folder: Path) -> None:
    (folder / "2.jsonl").unlink()


def add(folder: Path) -> None:
    write_lines(folder / "3.jsonl", texts(20, 60))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (edit, "1.jsonl has other content"),
        (append, "1.jsonl has other content"),
        (remove, "2.jsonl is gone"),
        (add, "3.jsonl is new"),
    ],
)
def test_changed_files_are_an_error_unless_changes_are_allowed(
    tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    job, before = three_files(tmp_path)
    change(tmp_path / "a")
    with pytest.raises(ConfigError, match=words) as error:
        tokenize(job)
    assert "run.allow_changes=true" in str(error.value)
    assert committed(Folder(job.data_url)) == before
    accepted = make_job(
        tmp_path,
        {"name": "a", "paths": [str(tmp_path / "a")]},
        validation_share=0,
        allow_changes=True,
    )
    after = tokenize(accepted)
    rows = [
        json.loads(line)["text"]
        for path in sorted((tmp_path / "a").iterdir())
        for line in path.read_text("utf-8").splitlines()
    ]
    assert documents(accepted) == rows
    assert after["inputs"] != before["inputs"]
    assert reusable_manifest(job) == after


def test_only_the_first_changes_are_listed(tmp_path: Path) -> None:
    job, _ = three_files(tmp_path)
    for shard in range(10, 20):
        write_lines(tmp_path / f"a/{shard}.jsonl", texts(1))
    with pytest.raises(ConfigError, match=r"14\.jsonl is new; and 5 more"):
        tokenize(job)


def test_a_changed_deny_list_is_a_change_of_the_data(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", texts(9))
    rule = '[[rules]]\nid = "r"\nreason = "r"\nsource = "s"\nany = ["{}"]\n'
    deny = tmp_path / "deny.toml"
    deny.write_text(rule.format("根治"), "utf-8")
    job = make_job(tmp_path, {"name": "a", "paths": [str(path)], "deny": [str(deny)]})
    tokenize(job)
    deny.write_text(rule.format("偏方"), "utf-8")
    with pytest.raises(ConfigError, match=r"deny.toml has other content"):
        tokenize(job)


def test_changed_settings_or_tokenizer_are_an_error_unless_changes_are_allowed(
    tmp_path: Path,
) -> None:
    three_files(tmp_path)
    source = {"name": "a", "paths": [str(tmp_path / "a")]}
    longer: dict[str, Any] = {"validation_share": 0, "max_length": 128}
    with pytest.raises(ConfigError, match=r"settings under \[data\]"):
        tokenize(make_job(tmp_path, source, **longer))
    assert reusable_manifest(make_job(tmp_path, source, allow_changes=True, **longer)) is None
    job = make_job(tmp_path, source, validation_share=0)
    other_tokenizer = TokenizeJob(**{**vars(job), "encoding": {"tokenizer": "words"}})
    with pytest.raises(ConfigError, match="the tokenizer"):
        tokenize(other_tokenizer)
    harmless = make_job(
        tmp_path, {**source, "weight": 2}, validation_share=0, max_malformed_share=1
    )
    assert reusable_manifest(harmless) is not None


def test_a_damaged_index_is_rebuilt(tmp_path: Path) -> None:
    job, manifest = three_files(tmp_path)
    (Path(job.data_url) / "train-00001.parquet").unlink()
    assert reusable_manifest(job) is None
    assert untimed(tokenize(job)) == untimed(manifest)


def untimed(manifest: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in manifest.items() if name != "time_s"}


def test_slices_grow_with_the_corpus_up_to_the_shard_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "x" * 1000}] * 4200)  # 4 MiB
    source = {"name": "a", "paths": [str(tmp_path / "a.jsonl")]}

    def num_slices(shard_mb: int) -> int:
        return len(list_all_slices(make_job(tmp_path, source, shard_mb=shard_mb).config))

    assert num_slices(32) == num_slices(1) > 3  # a small corpus is cut as finely as possible
    monkeypatch.setattr(tokenize_module, "MIN_SLICES", 2)  # as if it were large: 2 MiB each
    assert 1 < num_slices(32) < num_slices(1)


def test_an_interrupted_run_resumes_with_the_unfinished_slices(tmp_path: Path) -> None:
    job, manifest = three_files(tmp_path)
    again = TokenizeJob(**{**vars(job), "data_url": str(tmp_path / "again/data")})
    slices = list_all_slices(again.config)
    prepare_folders(again)
    for number in (0, 2):
        tokenize_slice(slices[number], number, job=again)
    (Path(again.data_url) / "units/.00001.json.half").write_text("{")
    prepare_folders(again)
    assert set(finished_slices(again)) == {0, 2}
    (Path(again.data_url) / "train-00002.parquet").unlink()
    assert set(finished_slices(again)) == {0}
    assert untimed(tokenize(again)) == untimed(manifest)
    assert not (Path(again.data_url) / "units").exists()


def test_results_of_an_interrupted_run_are_discarded_if_its_inputs_changed(tmp_path: Path) -> None:
    job, _ = three_files(tmp_path)
    again = {**vars(job), "data_url": str(tmp_path / "again/data")}
    prepare_folders(TokenizeJob(**again))
    tokenize_slice(list_all_slices(job.config)[0], 0, job=TokenizeJob(**again))
    other = TokenizeJob(**{**again, "encoding": {"tokenizer": "words"}})
    prepare_folders(other)
    assert finished_slices(other) == {}


# with Ray


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_ray_data_writes_the_same_shards(tmp_path: Path) -> None:
    job, alone = three_files(tmp_path)
    fresh = TokenizeJob(**{**vars(job), "data_url": str(tmp_path / "ray/data")})
    seen = []
    manifest = tokenize_sources(fresh, data_cpus=1, on_progress=lambda *done: seen.append(done))
    assert untimed(manifest) == untimed(alone)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    tokenize_sources(fresh, data_cpus=1, on_progress=lambda *done: pytest.fail("work was repeated"))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_config_error_in_a_task_reaches_the_driver(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", texts(1))
    job = make_job(tmp_path, {"name": "a", "paths": [str(path)]})
    job = TokenizeJob(**{**vars(job), "make_encode": refuse_to_encode})
    with pytest.raises(ConfigError) as error:
        tokenize_sources(job, data_cpus=1, on_progress=lambda *done: None)
    assert str(error.value) == "objective.kind=clm: the tokenizer has no end token"

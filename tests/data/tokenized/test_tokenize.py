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
from medgpt.data.tokenized import tokenize as index_module
from medgpt.data.tokenized.encode import Encoded
from medgpt.data.tokenized.shards import data_version, read_block, read_index
from medgpt.data.tokenized.tokenize import (
    Encode,
    IndexJob,
    all_units,
    begin_index,
    build_index,
    finish_index,
    finished_units,
    index_unit,
    reusable,
)

SECRET = "张三的病历"


def encode(records: Sequence[Record]) -> list[Encoded | Reject]:
    """One token for each character; texts over 400 characters are set aside."""
    results: list[Encoded | Reject] = []
    for record in records:
        text = (
            record.text
            if isinstance(record, Document)
            else "".join(message.content for message in record.messages)
        )
        place = {"source": record.source, "file": record.file, "row": record.row}
        if len(text) > 400:
            reason = f"{len(text)} characters are too long"
            results.append(Reject(**place, reason=reason, malformed=False))
            continue
        ids = np.array([ord(character) for character in text], np.int32)
        results.append(Encoded(input_ids=ids, targets=np.ones(len(ids), np.bool_)))
    return results


def make_encode() -> Encode:
    return encode


def refuse_to_encode() -> Encode:
    raise ConfigError("objective.kind=clm: the tokenizer has no end token")


def make_job(
    folder: Path, *sources: dict[str, Any], allow_changes: bool = False, **data: Any
) -> IndexJob:
    defaults = {"licence": "MIT", "deny": []}
    tree = {"sources": [{**defaults, **source} for source in sources], "max_length": 64, **data}
    return IndexJob(
        data_url=str(folder / "run/data"),
        rejected_url=str(folder / "run/rejected"),
        config=DataConfig.model_validate(tree),
        encoding={"tokenizer": "characters"},
        make_encode=make_encode,
        allow_changes=allow_changes,
    )


def index(job: IndexJob) -> dict[str, Any]:
    """`build_index` in this process."""
    check_sources(job.config)
    if manifest := reusable(job):
        return manifest
    units = all_units(job.config)
    stamps = begin_index(job)
    results = [index_unit(unit, number, job=job) for number, unit in enumerate(units)]
    results = json.loads(json.dumps(results))
    return finish_index(job, units, results, stamps, began=time.monotonic())


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return path


def texts(number: int, start: int = 0) -> list[dict[str, str]]:
    return [{"text": f"document {i}"} for i in range(start, start + number)]


def ids_of(job: IndexJob, split: str = "train") -> list[bytes]:
    return read_index(Folder(job.data_url), split).sample_id.tolist()


def documents(job: IndexJob, split: str = "train") -> list[str]:
    """The texts that the shards hold, in index order."""
    entries = read_index(Folder(job.data_url), split)
    found = []
    for number, row in zip(entries.block.tolist(), entries.row.tolist(), strict=True):
        block = read_block(job.data_url, split, number, data_version(job.data_url))
        span = slice(block.offsets[row], block.offsets[row + 1])
        found.append("".join(map(chr, block.input_ids[span])))
    return found


def test_preferences_about_one_prompt_stay_whole_and_on_one_side(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{number:03d}", "chosen": "x" * 100, "rejected": f"{pair}"}
        for number in range(100)
        for pair in range(2)
    ]
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    source = {"name": "pairs", "paths": [str(path)]}
    packed = make_job(tmp_path, source, validation_share=0.3)
    job = IndexJob(**{**vars(packed), "packed": False})

    manifest = index(job)

    train, held_out = ([text[:3] for text in documents(job, s)] for s in ("train", "validation"))
    assert not set(train) & set(held_out)
    assert all(train.count(prompt) == 2 for prompt in train)
    assert 20 < len(held_out) < 100
    assert len(set(ids_of(job))) == manifest["num_samples"] == len(train)
    assert manifest["num_chunks"] == len(train)  # although each is longer than max_length


def test_every_row_is_trained_held_out_or_set_aside_with_its_reason(tmp_path: Path) -> None:
    bad = [{"text": ""}, {"wrong": SECRET}, [SECRET]]
    long = {"text": SECRET * 100}
    write_lines(tmp_path / "a/0.jsonl", [*texts(200), *bad, long])
    write_lines(tmp_path / "a/1.jsonl", [*texts(100, 200), *bad[:1]])
    write_lines(tmp_path / "b.jsonl", texts(50, 500))
    job = make_job(
        tmp_path,
        {"name": "a", "paths": [str(tmp_path / "a")], "sensitive": True},
        {"name": "b", "paths": [str(tmp_path / "b.jsonl")], "licence": "CC0-1.0"},
        validation_share=0.2,
        max_malformed_share=0.05,
    )
    manifest = index(job)
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
    everything = documents(job) + documents(job, "validation")
    assert sorted(everything) == sorted(row["text"] for row in texts(300) + texts(50, 500))
    assert manifest["num_tokens"] == sum(map(len, documents(job)))
    assert sum(manifest["tokens_by_source"].values()) == manifest["num_tokens"]
    assert manifest["dropped_tail_tokens"] == 0


def test_rejected_rows_are_named_but_not_quoted_in_a_folder_of_the_owner(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [*texts(3), {"wrong": SECRET}, {"text": SECRET * 99}])
    job = make_job(
        tmp_path, {"name": "a", "paths": [str(path)]}, max_malformed_share=0.5, validation_share=0
    )
    index(job)
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
        index(make_job(tmp_path, source))
    assert str(tmp_path / "run/rejected") in str(error.value)
    assert SECRET not in str(error.value)
    assert committed(Folder(str(tmp_path / "run/data"))) is None
    assert (
        index(make_job(tmp_path, source, max_malformed_share=0.02))["sources"]["a"]["rows"] == 100
    )


def test_indexing_again_leaves_nothing_of_the_time_before(tmp_path: Path) -> None:
    for shard in range(3):
        write_lines(tmp_path / f"a/{shard}.jsonl", [*texts(9, 10 * shard), {"text": ""}])
    source = {"name": "a", "paths": [str(tmp_path / "a")]}
    with pytest.raises(ConfigError, match="malformed"):
        index(make_job(tmp_path, source, validation_share=0))
    (tmp_path / "a/2.jsonl").unlink()
    write_lines(tmp_path / "a/1.jsonl", texts(9, 10))
    job = make_job(tmp_path, source, validation_share=0, max_malformed_share=0.1)
    index(job)
    assert Folder(job.rejected_url).names() == ["unit-00000.jsonl"]
    shards = [name for name in Folder(job.data_url).names() if name.startswith("train-")]
    assert shards == ["train-00000.parquet", "train-00001.parquet"]


def test_a_repeated_unit_rewrites_the_same_shard(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", texts(100))
    job = make_job(tmp_path, {"name": "a", "paths": [str(path)]})
    manifest = index(job)
    again = index_unit(all_units(job.config)[0], 0, job=job)
    assert again["files"] == [f for f in manifest["files"] if f["name"] in str(again["files"])]
    assert committed(Folder(job.data_url), verify=True)


def test_sample_ids_depend_neither_on_files_nor_on_units(tmp_path: Path) -> None:
    rows = [{"text": f"document {i % 9000} {'x' * 200}"} for i in range(12_000)]
    whole = write_lines(tmp_path / "one/0.jsonl", rows)
    for shard in range(5):
        write_lines(tmp_path / f"many/{shard}.jsonl", rows[shard::5])
    found = []
    for paths, shard_mb in ((whole, 32), (whole, 1), (tmp_path / "many", 32)):
        source = {"name": "a", "paths": [str(paths)]}
        job = make_job(tmp_path / str(len(found)), source, shard_mb=shard_mb, validation_share=0.1)
        index(job)
        found.append([sorted(ids_of(job, split)) for split in ("train", "validation")])
        everything = [name for split in found[-1] for name in split]
        assert len(set(everything)) == len(everything) == 12_000
    assert found[0] == found[1] == found[2]
    assert len(all_units(make_job(tmp_path, source, shard_mb=1).config)) == 5
    assert (
        len(all_units(make_job(tmp_path, {**source, "paths": [str(whole)]}, shard_mb=1).config)) > 1
    )


def test_equal_contents_fall_on_the_same_side(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", texts(200) * 3)
    job = make_job(tmp_path, {"name": "a", "paths": [str(path)]}, validation_share=0.3)
    index(job)
    train, validation = set(documents(job)), set(documents(job, "validation"))
    assert not train & validation
    assert 30 < len(validation) < 90


def test_what_a_mapping_trims_is_counted(tmp_path: Path) -> None:
    turns = ["assistant", "user", "assistant", "user"]
    talk = {"turns": [{"role": role, "content": f"{role} says"} for role in turns]}
    path = write_lines(tmp_path / "a.jsonl", [talk] * 3)
    mapping = {"turns": {"column": "turns", "trim": True}}
    source = {"name": "a", "paths": [str(path)], "mapping": mapping}
    account = index(make_job(tmp_path, source, validation_share=0))["sources"]["a"]
    assert (account["train"], account["trimmed_turns"]) == (3, 6)


def test_nothing_left_to_train_on_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "x" * 500}] * 3)
    with pytest.raises(ConfigError, match=r"no row is left .*N characters are too long \(3 rows\)"):
        index(make_job(tmp_path, {"name": "a", "paths": [str(path)]}))


def test_a_weighted_source_without_rows_is_an_error(tmp_path: Path) -> None:
    good = write_lines(tmp_path / "a.jsonl", texts(9))
    empty = write_lines(tmp_path / "b.jsonl", [{"text": "x" * 500}])
    sources = [{"name": "a", "paths": [str(good)]}, {"name": "b", "paths": [str(empty)]}]
    index(make_job(tmp_path, *sources, validation_share=0))
    weighted = [{**source, "weight": 1} for source in sources]
    for folder in (tmp_path, tmp_path / "fresh"):  # a finished index is asked again
        with pytest.raises(ConfigError, match=r"data.sources b weight=1: no row of it is left"):
            index(make_job(folder, *weighted, validation_share=0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paths": ["absent.jsonl"]}, "absent.jsonl"),
        ({"mapping": {"text": "{{ text"}}, "not a Jinja template"),
        ({"deny": ["absent.toml"]}, "no such file"),
    ],
)
def test_a_wrong_source_is_found_before_any_task_starts(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", texts(1))
    job = make_job(tmp_path, {"name": "a", "paths": [str(path)], **changes})
    with pytest.raises(ConfigError, match=message):
        build_index(job, data_cpus=1, on_progress=lambda done, total: None)


# unreadable files


def broken_parquet(folder: Path) -> Path:
    """Two good shards and a truncated one."""
    for shard in range(3):
        path = folder / f"{shard}.parquet"
        folder.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(texts(50, 100 * shard)), path)
    path.write_bytes(path.read_bytes()[:-200])
    return path


def broken_gzip(folder: Path) -> Path:
    for shard in range(3):
        lines = "".join(json.dumps(row) + "\n" for row in texts(5000, 10_000 * shard))
        path = folder / f"{shard}.jsonl.gz"
        folder.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(lines.encode()))
    path.write_bytes(path.read_bytes()[:-4000])
    return path


@pytest.mark.parametrize("make", [broken_parquet, broken_gzip])
def test_a_truncated_shard_among_good_ones_stops_the_run_unless_it_is_accepted(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    path = make(tmp_path / "a")
    source = {"name": "a", "paths": [str(tmp_path / "a")]}
    with pytest.raises(ConfigError, match="1 of 3 pieces of files cannot be read") as error:
        index(make_job(tmp_path, source))
    assert str(path) in str(error.value)
    assert "0.34" in str(error.value)
    job = make_job(tmp_path, source, max_malformed_share=0.34, validation_share=0)
    account = index(job)["sources"]["a"]
    assert len(account["unreadable_files"]) == 1
    assert account["unreadable_files"][0].startswith(f"{path}, row ")
    good = 100 if make is broken_parquet else 10_000
    assert good <= account["train"] == account["rows"] - 1


# a run that goes on


def three_files(tmp_path: Path) -> tuple[IndexJob, dict[str, Any]]:
    for shard in range(3):
        write_lines(tmp_path / f"a/{shard}.jsonl", texts(20, 20 * shard))
    job = make_job(tmp_path, {"name": "a", "paths": [str(tmp_path / "a")]}, validation_share=0)
    return job, index(job)


def test_finished_work_is_reused(tmp_path: Path) -> None:
    job, manifest = three_files(tmp_path)
    assert reusable(job) == manifest
    assert [Path(entry["file"]).name for entry in manifest["inputs"]] == [
        "0.jsonl",
        "1.jsonl",
        "2.jsonl",
    ]


def test_files_with_another_date_but_the_same_content_are_the_same(tmp_path: Path) -> None:
    job, manifest = three_files(tmp_path)
    copied = tmp_path / "a/1.jsonl"
    text = copied.read_text("utf-8")
    copied.unlink()
    copied.write_text(text, "utf-8")
    os.utime(copied, (0, 0))
    assert reusable(job) == manifest


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
def test_changed_files_are_refused_by_name_and_read_anew_if_told(
    tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    job, before = three_files(tmp_path)
    change(tmp_path / "a")
    with pytest.raises(ConfigError, match=words) as error:
        index(job)
    assert "run.allow_changes=true" in str(error.value)
    assert committed(Folder(job.data_url)) == before
    accepted = make_job(
        tmp_path,
        {"name": "a", "paths": [str(tmp_path / "a")]},
        validation_share=0,
        allow_changes=True,
    )
    after = index(accepted)
    rows = [
        json.loads(line)["text"]
        for path in sorted((tmp_path / "a").iterdir())
        for line in path.read_text("utf-8").splitlines()
    ]
    assert documents(accepted) == rows
    assert after["inputs"] != before["inputs"]
    assert reusable(job) == after


def test_many_changes_are_listed_in_part(tmp_path: Path) -> None:
    job, _ = three_files(tmp_path)
    for shard in range(10, 20):
        write_lines(tmp_path / f"a/{shard}.jsonl", texts(1))
    with pytest.raises(ConfigError, match=r"14\.jsonl is new; and 5 more"):
        index(job)


def test_a_changed_deny_list_is_a_change_of_the_data(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", texts(9))
    rule = '[[rules]]\nid = "r"\nreason = "r"\nsource = "s"\nany = ["{}"]\n'
    deny = tmp_path / "deny.toml"
    deny.write_text(rule.format("根治"), "utf-8")
    job = make_job(tmp_path, {"name": "a", "paths": [str(path)], "deny": [str(deny)]})
    index(job)
    deny.write_text(rule.format("偏方"), "utf-8")
    with pytest.raises(ConfigError, match=r"deny.toml has other content"):
        index(job)


def test_other_settings_or_another_tokenizer_are_read_anew_only_if_told(tmp_path: Path) -> None:
    three_files(tmp_path)
    source = {"name": "a", "paths": [str(tmp_path / "a")]}
    longer = {"validation_share": 0, "max_length": 128}
    with pytest.raises(ConfigError, match=r"settings under \[data\]"):
        index(make_job(tmp_path, source, **longer))
    assert reusable(make_job(tmp_path, source, allow_changes=True, **longer)) is None
    job = make_job(tmp_path, source, validation_share=0)
    other = IndexJob(**{**vars(job), "encoding": {"tokenizer": "words"}})
    with pytest.raises(ConfigError, match="the tokenizer"):
        index(other)
    harmless = make_job(
        tmp_path, {**source, "weight": 2}, validation_share=0, max_malformed_share=1
    )
    assert reusable(harmless) is not None


def test_a_damaged_index_is_made_again(tmp_path: Path) -> None:
    job, manifest = three_files(tmp_path)
    (Path(job.data_url) / "train-00001.parquet").unlink()
    assert reusable(job) is None
    assert untimed(index(job)) == untimed(manifest)


def untimed(manifest: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in manifest.items() if name != "time_s"}


def test_the_size_of_units_follows_the_corpus_up_to_the_shard_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "x" * 1000}] * 4200)  # 4 MiB
    source = {"name": "a", "paths": [str(tmp_path / "a.jsonl")]}

    def units(shard_mb: int) -> int:
        return len(all_units(make_job(tmp_path, source, shard_mb=shard_mb).config))

    assert units(32) == units(1) > 3  # a small corpus is cut as fine as can be
    monkeypatch.setattr(index_module, "FEWEST_UNITS", 2)  # as if it were large: 2 MiB each
    assert 1 < units(32) < units(1)


def test_an_interrupted_indexing_goes_on_with_the_units_that_are_left(tmp_path: Path) -> None:
    job, manifest = three_files(tmp_path)
    again = IndexJob(**{**vars(job), "data_url": str(tmp_path / "again/data")})
    units = all_units(again.config)
    begin_index(again)
    for number in (0, 2):
        index_unit(units[number], number, job=again)
    (Path(again.data_url) / "units/.00001.json.half").write_text("{")
    begin_index(again)
    assert set(finished_units(again)) == {0, 2}
    (Path(again.data_url) / "train-00002.parquet").unlink()
    assert set(finished_units(again)) == {0}
    assert untimed(index(again)) == untimed(manifest)
    assert not (Path(again.data_url) / "units").exists()


def test_an_interrupted_indexing_of_other_files_or_settings_is_forgotten(tmp_path: Path) -> None:
    job, _ = three_files(tmp_path)
    again = {**vars(job), "data_url": str(tmp_path / "again/data")}
    begin_index(IndexJob(**again))
    index_unit(all_units(job.config)[0], 0, job=IndexJob(**again))
    other = IndexJob(**{**again, "encoding": {"tokenizer": "words"}})
    begin_index(other)
    assert finished_units(other) == {}


# on Ray


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_ray_data_builds_the_same_index(tmp_path: Path) -> None:
    job, alone = three_files(tmp_path)
    fresh = IndexJob(**{**vars(job), "data_url": str(tmp_path / "ray/data")})
    seen = []
    manifest = build_index(fresh, data_cpus=1, on_progress=lambda *done: seen.append(done))
    assert untimed(manifest) == untimed(alone)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    build_index(fresh, data_cpus=1, on_progress=lambda *done: pytest.fail("work was repeated"))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_what_a_task_refuses_reaches_the_driver_in_words(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", texts(1))
    job = make_job(tmp_path, {"name": "a", "paths": [str(path)]})
    job = IndexJob(**{**vars(job), "make_encode": refuse_to_encode})
    with pytest.raises(ConfigError) as error:
        build_index(job, data_cpus=1, on_progress=lambda *done: None)
    assert str(error.value) == "objective.kind=clm: the tokenizer has no end token"

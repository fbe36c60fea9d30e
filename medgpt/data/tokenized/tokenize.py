"""Raw files to tokenised shards with an index, through Ray Data: one unit, one task, one shard.

A task streams its unit in bounded memory, can be repeated (it rewrites the same shard), and
accounts for every row: trained, held out for validation, or set aside with file, row and reason.
Its result is kept, so that an interrupted indexing goes on with the units that are left.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray.data
import xxhash

from medgpt.artifacts import MANIFEST, FileEntry, Folder, commit, committed
from medgpt.config.base import ConfigError
from medgpt.config.data import DataConfig
from medgpt.data.loader.ray_internals import Pace
from medgpt.data.sources.deny import DenyList
from medgpt.data.sources.inputs import (
    changed_files,
    check_sources,
    file_digest,
    file_stamp,
    fingerprint,
    input_files,
)
from medgpt.data.sources.readers import read_unit
from medgpt.data.sources.records import Document, Preferences, Record, Reject
from medgpt.data.sources.units import Unit, file_size, list_files, list_units
from medgpt.data.tokenized.index import num_chunks
from medgpt.data.tokenized.row_counts import Account, by_source, refuse_empty
from medgpt.data.tokenized.shards import ShardWriter, read_index, write_index

if TYPE_CHECKING:
    from medgpt.data.tokenized.encode import Encoded  # transformers

FEWEST_UNITS = 24  # of a corpus of as many MiB
BATCH_RECORDS = 256  # records tokenised together
SHOWN_CHANGES = 5
SPLITS = ("train", "validation")
UNITS = "units"  # results of single units, until all are done
BEGUN = "begun.json"  # what they were read from
NOT_INDEXED = {"max_malformed_share": True, "sources": {"__all__": {"weight"}}}

Encode = Callable[[Sequence[Record]], "list[Encoded | Reject]"]


@dataclass(frozen=True, kw_only=True)
class IndexJob:
    """What every index task needs. `make_encode` runs once in each process."""

    data_url: str
    rejected_url: str
    config: DataConfig
    encoding: Mapping[str, Any]  # JSON; what decides how a record becomes tokens
    make_encode: Callable[[], Encode]
    packed: bool = True  # samples share rows; else each has one of its own, uncut
    allow_changes: bool = False  # of files and settings since the data was tokenised


def build_index(
    job: IndexJob, *, data_cpus: float, on_progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Tokenise all sources into `job.data_url`; returns the manifest. Finished work is reused.

    Raises:
        ConfigError: files that are missing, unreadable, malformed, or not those that were tokenised
            before; nothing left to train on.
    """
    check_sources(job.config)
    if manifest := reusable(job):
        return manifest
    began = time.monotonic()
    units = all_units(job.config)
    stamps = begin_index(job)
    results = finished_units(job)
    _run(job, units, results, data_cpus=data_cpus, on_progress=on_progress)
    return finish_index(job, units, [results[n] for n in range(len(units))], stamps, began=began)


def all_units(config: DataConfig) -> list[Unit]:
    """Pieces of at most shard_mb; smaller ones of a small corpus, so that all cores have work.

    They depend on the data only, because shards are shuffled by their blocks.
    """
    files = [file for source in config.sources for file in list_files(source)]
    total_mb = sum(file_size(file) for file in files) >> 20
    size = min(config.shard_mb, max(1, total_mb // FEWEST_UNITS))
    return [unit for source in config.sources for unit in list_units(source, size)]


def reusable(job: IndexJob) -> dict[str, Any] | None:
    """The manifest of finished work on the same data; None if there is work to do.

    Raises:
        ConfigError: the data changed, and `job.allow_changes` does not accept it.
    """
    folder = Folder(job.data_url)
    if not folder.exists(MANIFEST):
        return None
    manifest = folder.read_json(MANIFEST)
    changes = list(changed_files(manifest["inputs"], job.config))
    if manifest["encoding"] != job.encoding:
        changes.append("the tokenizer or the objective is another one")
    if manifest["config"] != _indexed_config(job.config):
        changes.append("settings under [data] are others")
    if changes and not job.allow_changes:
        if (more := len(changes) - SHOWN_CHANGES) > 0:
            changes[SHOWN_CHANGES:] = [f"and {more} more"]
        raise ConfigError(
            f"the data changed since {job.data_url} was made of it: {'; '.join(changes)}. Restore "
            "it, choose another run.dir, or accept with run.allow_changes=true, which reads it anew"
        )
    if not changes and (manifest := committed(folder)):
        accounts = {name: _account(source) for name, source in manifest["sources"].items()}
        refuse_empty(accounts, job.config)  # weights may be others than then
        return manifest
    return None


def begin_index(job: IndexJob) -> dict[str, str]:
    """Clear what an earlier attempt left, unless it read the same. Returns the files' stamps."""
    stamps = {file: file_stamp(file) for file in input_files(job.config)}
    now = {"stamps": stamps, "encoding": job.encoding, "config": _indexed_config(job.config)}
    units, rejected = Folder(job.data_url) / UNITS, Folder(job.rejected_url)
    if not units.exists(BEGUN) or units.read_json(BEGUN) != now:
        for folder in (Folder(job.data_url), rejected):
            folder.remove()
        if rejected.is_local:  # it says which patient's row is wrong, so it is the owner's alone
            Path(rejected.root).mkdir(mode=0o700, parents=True)
        units.write_json(BEGUN, now)
    return stamps


def finished_units(job: IndexJob) -> dict[int, dict[str, Any]]:
    """Results of the units that an interrupted attempt has done."""
    folder = Folder(job.data_url)
    sizes = folder.sizes()
    results: dict[int, dict[str, Any]] = {}
    for name in (folder / UNITS).names():
        if name != BEGUN and not name.startswith("."):
            result = (folder / UNITS).read_json(name)
            if all(sizes.get(file["name"]) == file["size"] for file in result["files"]):
                results[int(name.removesuffix(".json"))] = result
    return results


def _run(
    job: IndexJob,
    units: Sequence[Unit],
    results: dict[int, dict[str, Any]],
    *,
    data_cpus: float,
    on_progress: Callable[[int, int], None],
) -> None:
    """Add the results of the units that have none yet, from Ray Data."""
    tasks = [{"number": n, **asdict(unit)} for n, unit in enumerate(units) if n not in results]
    if not tasks:
        return
    ray.data.DataContext.get_current().custom_execution_callback_classes = [Pace]
    dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(
        partial(index_task, job=job), num_cpus=data_cpus
    )
    for row in dataset.iter_rows():
        result = json.loads(row["result"])
        if "refused" in result:
            raise ConfigError(result["refused"])
        results[row["number"]] = result
        on_progress(len(results), len(units))


def index_task(task: dict[str, Any], *, job: IndexJob) -> dict[str, Any]:
    """`index_unit` as a row function. A ConfigError is a result: Ray Data would wrap it."""
    unit = Unit(**{name: value for name, value in task.items() if name != "number"})
    try:
        result = index_unit(unit, task["number"], job=job)
    except ConfigError as error:
        result = {"refused": str(error)}
    return {"number": task["number"], "result": json.dumps(result)}


def index_unit(unit: Unit, number: int, *, job: IndexJob) -> dict[str, Any]:
    """Read, clean, tokenise and write one unit; returns its account, files and digest as JSON."""
    numbers = {source.name: i for i, source in enumerate(job.config.sources)}
    source = job.config.sources[numbers[unit.source]]
    folder = Folder(job.data_url)
    account, rejects = Account(), []
    items = _encoded(read_unit(unit, source), DenyList.load(source.deny), job.make_encode())
    train, validation = (ShardWriter(folder, f"{s}-{number:05d}.parquet") for s in SPLITS)
    with train, validation:
        for item in items:
            if isinstance(item, Reject):
                account.reject(item)
                rejects.append(item)
                continue
            record, encoded = item
            content = content_hash(record)
            held_out = is_validation(split_key(record, content), job.config.validation_share)
            account.keep(record, encoded, held_out=held_out)
            (validation if held_out else train).add(
                encoded, content_hash=content, source=numbers[unit.source], origin=record
            )
    if rejects:
        lines = [json.dumps(asdict(reject), ensure_ascii=False) + "\n" for reject in rejects]
        Folder(job.rejected_url).write_text(f"unit-{number:05d}.jsonl", "".join(lines))
    result = {
        "account": asdict(account),
        "files": [asdict(file) for file in train.files + validation.files],
        "digest": None if unit.start else file_digest(unit.file),  # once for each file
    }
    (folder / UNITS).write_json(f"{number:05d}.json", result)
    return result


def _encoded(
    items: Iterator[Record | Reject], deny: DenyList, encode: Encode
) -> "Iterator[Reject | tuple[Record, Encoded]]":
    """Records with their tokens, in batches; rejects pass through."""
    while batch := list(islice(items, BATCH_RECORDS)):
        checked = [x if isinstance(x, Reject) else deny.check(x) for x in batch]
        records = [x for x in checked if not isinstance(x, Reject)]
        yield from (x for x in checked if isinstance(x, Reject))
        for record, encoded in zip(records, encode(records), strict=True):
            yield encoded if isinstance(encoded, Reject) else (record, encoded)


def content_hash(record: Record) -> str:
    """32 hexadecimal characters of what the record says, wherever it stands."""
    if isinstance(record, Document):
        text = record.text
    else:
        said: list[Any] = [(m.role, m.content) for m in record.messages]
        if isinstance(record, Preferences):
            answers = [[(m.role, m.content) for m in answer] for answer in record.answers]
            said = [len(record.prompt), said, answers, record.grades]
        text = json.dumps(said, ensure_ascii=False)
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def split_key(record: Record, content: str) -> str:
    """Preferences about one prompt fall on the same side, or answers would be known there."""
    if not isinstance(record, Preferences):
        return content
    prompt = json.dumps([(m.role, m.content) for m in record.prompt], ensure_ascii=False)
    return xxhash.xxh3_128_hexdigest(prompt.encode("utf-8", "surrogatepass"))


def is_validation(content: str, share: float) -> bool:
    """Equal contents always fall on the same side."""
    return int(content[:8], 16) < share * 2**32


def finish_index(
    job: IndexJob,
    units: Sequence[Unit],
    results: Sequence[dict[str, Any]],
    stamps: Mapping[str, str],
    *,
    began: float,
) -> dict[str, Any]:
    """Write the index over the units' shards and commit; returns the manifest.

    Raises:
        ConfigError: too many rows or files are bad, or nothing is left to train on.
    """
    folder = Folder(job.data_url)
    accounts = by_source(
        job.config,
        units,
        [Account(**result["account"]) for result in results],
        rejected_url=job.rejected_url,
    )
    refuse_empty(accounts, job.config)
    files = [FileEntry(**entry) for result in results for entry in result["files"]]
    for split in SPLITS:
        shards = [file.name for file in files if file.name.startswith(f"{split}-")]
        files += write_index(folder, split, shards)
    totals = {split: _totals(folder, split, job) for split in SPLITS}
    digests = {u.file: r["digest"] for u, r in zip(units, results, strict=True) if r["digest"]}
    digests |= {file: file_digest(file) for file in stamps if file not in digests}  # deny-lists
    commit(
        folder,
        files,
        sources={
            source.name: {
                "licence": source.licence,
                "sensitive": source.sensitive,
                **asdict(accounts[source.name]),
            }
            for source in job.config.sources
        },
        inputs=fingerprint(stamps, digests),
        encoding=job.encoding,
        config=_indexed_config(job.config),
        time_s=time.monotonic() - began,
        **totals["train"],
        validation=totals["validation"],
    )
    (folder / UNITS).remove()
    manifest = committed(folder)
    assert manifest is not None, f"{folder.url} lacks files that were just written"
    return manifest


def _indexed_config(config: DataConfig) -> dict[str, Any]:
    """The settings that decide what the shards hold."""
    return config.model_dump(mode="json", exclude=NOT_INDEXED)


def _account(source: Mapping[str, Any]) -> Account:
    return Account(**{n: v for n, v in source.items() if n not in ("licence", "sensitive")})


def _totals(folder: Folder, split: str, job: IndexJob) -> dict[str, Any]:
    index, config = read_index(folder, split), job.config
    max_length = config.max_length if job.packed else None
    by_source = np.bincount(index.source, weights=index.length, minlength=len(config.sources))
    names = [source.name for source in config.sources]
    return {
        "num_samples": len(index),
        "num_chunks": int(num_chunks(index.length, max_length).sum()),
        "num_tokens": int(index.length.sum()),
        "tokens_by_source": {n: int(t) for n, t in zip(names, by_source, strict=True)},
        "dropped_tail_tokens": 0,  # the last batch of an epoch is short, not dropped
    }

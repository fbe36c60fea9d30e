"""Tokenizes raw files into shards with an index, with Ray Data: one task per slice and shard.

A task streams its slice in bounded memory, can be repeated (it rewrites the same shard), and
counts every row: trained, held out for validation, or set aside with file, row and reason. Its
result is stored, so that an interrupted run resumes with the unfinished slices.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray.data

from medgpt.artifacts import MANIFEST, FileEntry, Folder, commit, committed
from medgpt.config.base import ConfigError
from medgpt.config.data import DataConfig
from medgpt.data.loader.ray_internals import ThrottleIdleLoop
from medgpt.data.sources.deny_list import DenyList
from medgpt.data.sources.file_slices import FileSlice, file_size, list_files, list_slices
from medgpt.data.sources.inputs import (
    check_sources,
    describe_changes,
    file_digest,
    file_stamp,
    input_files,
)
from medgpt.data.sources.readers import read_slice
from medgpt.data.sources.records import Document, Preferences, Record, Reject
from medgpt.data.tokenized.index import num_chunks
from medgpt.data.tokenized.row_counts import RowCounts, refuse_empty, sum_by_source
from medgpt.data.tokenized.settings import tokenization_settings, with_defaults
from medgpt.data.tokenized.shards import ShardWriter, read_index, write_index
from medgpt.data.tokenized.split import content_hash, is_validation, part_hash

if TYPE_CHECKING:
    from medgpt.data.tokenized.encode import EncodedSample  # imports transformers

MIN_SLICES = 24  # of a corpus of at least as many MiB
BATCH_RECORDS = 256  # records tokenized together
BATCH_CHARACTERS = 1 << 18  # of them; tokenizers need some 200 bytes for each
NUM_SHOWN_CHANGES = 5
SPLITS = ("train", "validation")
SLICE_RESULTS = "units"  # folder of the results of slices, removed in the end
INPUTS_FILE = "begun.json"  # the inputs of these results

EncodeBatch = Callable[[Sequence[Record]], "list[EncodedSample | Reject]"]


@dataclass(frozen=True, kw_only=True)
class TokenizeJob:
    """Arguments of every tokenization task."""

    data_url: str
    rejected_url: str
    config: DataConfig
    encoding: Mapping[str, Any]  # JSON; every setting that affects the tokens of a record
    make_encode: Callable[[], EncodeBatch]
    packing: bool = True  # False: every sample has a row of its own, uncut
    allow_changes: bool = False  # tokenize again if files or settings changed


def tokenize_sources(
    job: TokenizeJob, *, data_cpus: float, on_progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Tokenize all sources into `job.data_url` and return the manifest. Reuses finished work.

    Raises:
        ConfigError: files are missing, unreadable, malformed or changed since they were tokenized,
            or no row is left to train on.
    """
    check_sources(job.config)
    if manifest := reusable_manifest(job):
        return manifest
    started_at = time.monotonic()
    slices = list_all_slices(job.config)
    stamps = prepare_folders(job)
    results = finished_slices(job)
    unfinished = {n: slices[n] for n in range(len(slices)) if n not in results}
    for number, result in _run_tasks(job, unfinished, data_cpus):
        results[number] = result
        on_progress(len(results), len(slices))
    ordered = [results[n] for n in range(len(slices))]
    return commit_shards(job, slices, ordered, stamps, started_at=started_at)


def list_all_slices(config: DataConfig) -> list[FileSlice]:
    """Return slices of at most shard_mb, smaller in a small corpus so that all cores have work.

    They depend on the data only, because shards are shuffled by their blocks.
    """
    files = [file for source in config.sources for file in list_files(source)]
    total_mb = sum(file_size(file) for file in files) >> 20
    slice_mb = min(config.shard_mb, max(1, total_mb // MIN_SLICES))
    return [item for source in config.sources for item in list_slices(source, slice_mb)]


def reusable_manifest(job: TokenizeJob) -> dict[str, Any] | None:
    """Return the manifest of finished work on the same data, or None if there is work to do.

    Raises:
        ConfigError: the data changed, and `job.allow_changes` does not accept it.
    """
    folder = Folder(job.data_url)
    if not folder.exists(MANIFEST):
        return None
    manifest = folder.read_json(MANIFEST)
    changes = list(describe_changes(manifest["inputs"], job.config))
    if manifest["encoding"] != job.encoding:
        changes.append("the tokenizer or the objective changed")
    if with_defaults(manifest["config"]) != tokenization_settings(job.config):
        changes.append("settings under [data] changed")
    if changes and not job.allow_changes:
        if (more := len(changes) - NUM_SHOWN_CHANGES) > 0:
            changes[NUM_SHOWN_CHANGES:] = [f"and {more} more"]
        raise ConfigError(
            f"the data changed since {job.data_url} was made: {'; '.join(changes)}. Restore "
            "it, choose another run.dir, or set run.allow_changes=true to tokenize it again"
        )
    if not changes and (manifest := committed(folder)):
        counts = {
            name: RowCounts(**{key: source[key] for key in vars(RowCounts()) if key in source})
            for name, source in manifest["sources"].items()
        }
        refuse_empty(counts, job.config)  # weights may have changed since
        return manifest
    return None


def prepare_folders(job: TokenizeJob) -> dict[str, str]:
    """Remove files of an earlier attempt with other inputs. Returns the stamps of the inputs."""
    stamps = {file: file_stamp(file) for file in input_files(job.config)}
    inputs = {
        "stamps": stamps,
        "encoding": job.encoding,
        "config": tokenization_settings(job.config),
    }
    slice_results, rejected = Folder(job.data_url) / SLICE_RESULTS, Folder(job.rejected_url)
    if not slice_results.exists(INPUTS_FILE) or _recorded_inputs(slice_results) != inputs:
        for folder in (Folder(job.data_url), rejected):
            folder.remove()
        if rejected.is_local:  # it names rows of patients: readable by the owner only
            Path(rejected.root).mkdir(mode=0o700, parents=True)
        slice_results.write_json(INPUTS_FILE, inputs)
    return stamps


def _recorded_inputs(slice_results: Folder) -> dict[str, Any]:
    inputs = slice_results.read_json(INPUTS_FILE)
    return {**inputs, "config": with_defaults(inputs["config"])}


def finished_slices(job: TokenizeJob) -> dict[int, dict[str, Any]]:
    """Return the results of the slices that an interrupted attempt finished, by number."""
    folder = Folder(job.data_url)
    sizes = folder.sizes()
    results: dict[int, dict[str, Any]] = {}
    for name in (folder / SLICE_RESULTS).names():
        if name != INPUTS_FILE and not name.startswith("."):
            result = (folder / SLICE_RESULTS).read_json(name)
            if all(sizes.get(file["name"]) == file["size"] for file in result["files"]):
                results[int(name.removesuffix(".json"))] = result
    return results


def _run_tasks(
    job: TokenizeJob, slices: Mapping[int, FileSlice], data_cpus: float
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Tokenize slices with Ray Data; yields their numbers and results."""
    if not slices:
        return
    tasks = [{"number": number, **asdict(file_slice)} for number, file_slice in slices.items()]
    ray.data.DataContext.get_current().custom_execution_callback_classes = [ThrottleIdleLoop]
    dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(
        partial(tokenize_task, job=job), num_cpus=data_cpus
    )
    for row in dataset.iter_rows():
        result = json.loads(row["result"])
        if "refused" in result:
            raise ConfigError(result["refused"])
        yield row["number"], result


def tokenize_task(task: dict[str, Any], *, job: TokenizeJob) -> dict[str, Any]:
    """`tokenize_slice` as a row function. Returns a ConfigError as a result: Ray would wrap it."""
    file_slice = FileSlice(**{name: value for name, value in task.items() if name != "number"})
    try:
        result = tokenize_slice(file_slice, task["number"], job=job)
    except ConfigError as error:
        result = {"refused": str(error)}
    return {"number": task["number"], "result": json.dumps(result)}


def tokenize_slice(file_slice: FileSlice, number: int, *, job: TokenizeJob) -> dict[str, Any]:
    """Read, clean, tokenize and write one slice; returns row counts, files and digest as JSON."""
    names = [source.name for source in job.config.sources]
    source = job.config.sources[source_number := names.index(file_slice.source)]
    folder = Folder(job.data_url)
    counts, rejects = RowCounts(), []
    items = _encode_records(
        read_slice(file_slice, source), DenyList.load(source.deny), job.make_encode()
    )
    train, validation = (ShardWriter(folder, f"{s}-{number:05d}.parquet") for s in SPLITS)
    with train, validation:
        for item in items:
            if isinstance(item, Reject):
                counts.count_reject(item)
                rejects.append(item)
                continue
            record, encoded = item
            content = content_hash(record)
            held_out = is_validation(record, content, job.config.validation_share)
            counts.count_sample(record, encoded, is_validation=held_out)
            for sample in (encoded, *encoded.further):
                (validation if held_out else train).add(
                    sample,
                    content_hash=part_hash(content, sample.turn) if encoded.further else content,
                    source=source_number,
                    origin=record,
                )
    if rejects:
        Folder(job.rejected_url).write_jsonl(f"unit-{number:05d}.jsonl", map(asdict, rejects))
    result = {
        "account": asdict(counts),
        "files": [asdict(file) for file in train.files + validation.files],
        "digest": None if file_slice.start else file_digest(file_slice.file),  # once per file
    }
    (folder / SLICE_RESULTS).write_json(f"{number:05d}.json", result)
    return result


def _encode_records(
    items: Iterator[Record | Reject], deny: DenyList, encode: EncodeBatch
) -> "Iterator[Reject | tuple[Record, EncodedSample]]":
    """Yield records with their tokens, encoded in batches; passes rejects through."""
    for batch in _batches(items):
        checked = [x if isinstance(x, Reject) else deny.check(x) for x in batch]
        records = [x for x in checked if not isinstance(x, Reject)]
        yield from (x for x in checked if isinstance(x, Reject))
        for record, encoded in zip(records, encode(records), strict=True):
            yield encoded if isinstance(encoded, Reject) else (record, encoded)


def _batches(items: Iterable[Record | Reject]) -> Iterator[list[Record | Reject]]:
    """Yield batches of at most BATCH_RECORDS items and, unless it is one, BATCH_CHARACTERS."""
    batch: list[Record | Reject] = []
    size = 0
    for item in items:
        added = _num_characters(item)
        if batch and (len(batch) == BATCH_RECORDS or size + added > BATCH_CHARACTERS):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += added
    if batch:
        yield batch


def _num_characters(item: Record | Reject) -> int:
    if isinstance(item, Reject):
        return 0
    if isinstance(item, Document):
        return len(item.text)
    turns = [item.messages]
    if isinstance(item, Preferences):
        turns = [item.prompt, *item.answers]
    return sum(len(message.content) for messages in turns for message in messages)


def commit_shards(
    job: TokenizeJob,
    slices: Sequence[FileSlice],
    results: Sequence[dict[str, Any]],
    stamps: Mapping[str, str],
    *,
    started_at: float,
) -> dict[str, Any]:
    """Write the index over all shards, commit, and return the manifest.

    Raises:
        ConfigError: too many rows or files are bad, or no row is left to train on.
    """
    folder = Folder(job.data_url)
    source_counts = sum_by_source(
        job.config,
        slices,
        [RowCounts(**result["account"]) for result in results],
        rejected_url=job.rejected_url,
    )
    refuse_empty(source_counts, job.config)
    files = [FileEntry(**entry) for result in results for entry in result["files"]]
    for split in SPLITS:
        shards = [file.name for file in files if file.name.startswith(f"{split}-")]
        files += write_index(folder, split, shards)
    totals = {split: _count_tokens(folder, split, job) for split in SPLITS}
    digests = {s.file: r["digest"] for s, r in zip(slices, results, strict=True) if r["digest"]}
    digests |= {file: file_digest(file) for file in stamps if file not in digests}  # deny-lists
    commit(
        folder,
        files,
        sources={
            source.name: {
                "licence": source.license,
                "sensitive": source.sensitive,
                **asdict(source_counts[source.name]),
            }
            for source in job.config.sources
        },
        inputs=[{"file": f, "stamp": stamp, "xxh128": digests[f]} for f, stamp in stamps.items()],
        encoding=job.encoding,
        config=tokenization_settings(job.config),
        time_s=time.monotonic() - started_at,
        **totals["train"],
        validation=totals["validation"],
    )
    (folder / SLICE_RESULTS).remove()
    manifest = committed(folder)
    assert manifest is not None, f"{folder.url} lacks files that were just written"
    return manifest


def _count_tokens(folder: Folder, split: str, job: TokenizeJob) -> dict[str, Any]:
    index, config = read_index(folder, split), job.config
    max_length = config.max_length if job.packing else None
    by_source = np.bincount(index.source, weights=index.length, minlength=len(config.sources))
    names = [source.name for source in config.sources]
    return {
        "num_samples": len(index),
        "num_chunks": int(num_chunks(index.length, max_length).sum()),
        "num_tokens": int(index.length.sum()),
        "tokens_by_source": {n: int(t) for n, t in zip(names, by_source, strict=True)},
        "dropped_tail_tokens": 0,  # the last batch of an epoch is short, not dropped
    }

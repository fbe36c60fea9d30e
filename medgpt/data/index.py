"""Raw files to tokenised shards with an index, through Ray Data: one unit of a file, one task, one shard.

A task streams its unit in bounded memory, can be repeated (it rewrites the same shard), and
accounts for every row: trained, held out for validation, or set aside with file, row and reason.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import ray.data
import xxhash

from medgpt.config import ConfigError, DataConfig
from medgpt.data.deny import DenyList
from medgpt.data.encode import Encoded
from medgpt.data.order import num_chunks
from medgpt.data.readers import read_unit
from medgpt.data.records import Conversation, Record, Reject
from medgpt.data.shards import ShardWriter, read_index, write_index
from medgpt.data.units import Unit, list_units
from medgpt.runs import FileEntry, Folder, commit, committed

BATCH_RECORDS = 256  # records tokenised together
SPLITS = ("train", "validation")

Encode = Callable[[Sequence[Record]], list[Encoded | Reject]]


@dataclass(frozen=True, kw_only=True)
class IndexJob:
    """What every index task needs. `make_encode` runs once in each process."""

    data_url: str
    rejected_url: str
    config: DataConfig
    make_encode: Callable[[], Encode]


@dataclass
class Account:
    """Rows of a unit or a source: rows = train + validation + sum of set_aside."""

    rows: int = 0
    train: int = 0
    validation: int = 0
    malformed: int = 0
    truncated_turns: int = 0
    set_aside: dict[str, int] = field(default_factory=dict)  # reason -> rows

    def add(self, other: "Account") -> None:
        for name in ("rows", "train", "validation", "malformed", "truncated_turns"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.set_aside = dict(Counter(self.set_aside) + Counter(other.set_aside))


def build_index(
    job: IndexJob, *, data_cpus: float, on_progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Tokenise all sources into `job.data_url`; returns the manifest. Done work is reused.

    Raises:
        ConfigError: no files, too many malformed rows, nothing left to train on, or the files
            are not those that were indexed before.
    """
    folder = Folder(job.data_url)
    units = [unit for s in job.config.sources for unit in list_units(s, job.config.shard_mb)]
    if manifest := committed(folder):
        return manifest
    tasks = [{"number": number, **asdict(unit)} for number, unit in enumerate(units)]
    dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(
        partial(index_unit, job=job), num_cpus=data_cpus
    )
    results: dict[int, dict[str, Any]] = {}
    for row in dataset.iter_rows():
        results[row["number"]] = json.loads(row["result"])
        on_progress(len(results), len(tasks))
    ordered = [results[number] for number in range(len(tasks))]
    accounts = _by_source(job.config, units, ordered)
    _refuse_malformed(job, accounts)
    files = [FileEntry(**entry) for result in ordered for entry in result["files"]]
    for split in SPLITS:
        shards = [file.name for file in files if file.name.startswith(f"{split}-")]
        files += write_index(folder, split, shards)
    totals = {split: _totals(folder, split, job.config) for split in SPLITS}
    _refuse_empty(job, accounts, totals["train"]["num_samples"])
    commit(
        folder,
        files,
        sources={name: asdict(account) for name, account in accounts.items()},
        inputs=fingerprint(units, [result["digest"] for result in ordered]),
        **totals["train"],
        validation=totals["validation"],
    )
    return committed(folder) or {}


def index_unit(task: dict[str, Any], *, job: IndexJob) -> dict[str, Any]:
    """One Ray Data task: read, clean, tokenise and write one unit; returns its account."""
    number = task.pop("number")
    unit = Unit(**task)
    numbers = {source.name: i for i, source in enumerate(job.config.sources)}
    source = job.config.sources[numbers[unit.source]]
    folder = Folder(job.data_url)
    writers = {s: ShardWriter(folder, f"{s}-{number:05d}.parquet") for s in SPLITS}
    account, rejects = Account(), []
    deny = DenyList.load(source.deny)
    for item in _encoded(read_unit(unit, source), deny, job.make_encode()):
        account.rows += 1
        if isinstance(item, Reject):
            rejects.append(item)
            continue
        record, encoded = item
        content = content_hash(record)
        split = SPLITS[is_validation(content, job.config.validation_share)]
        setattr(account, split, getattr(account, split) + 1)
        account.truncated_turns += encoded.num_truncated_turns
        writers[split].add(
            encoded, content_hash=content, source=numbers[unit.source], origin=record
        )
    account.malformed = sum(reject.malformed for reject in rejects)
    account.set_aside = dict(Counter(_kind(reject.reason) for reject in rejects))
    if rejects:
        lines = [json.dumps(asdict(reject), ensure_ascii=False) + "\n" for reject in rejects]
        Folder(job.rejected_url).write_text(f"unit-{number:05d}.jsonl", "".join(lines))
    files = [asdict(file) for writer in writers.values() for file in writer.close()]
    result = {"account": asdict(account), "files": files, "digest": unit_digest(unit)}
    return {"number": number, "result": json.dumps(result)}


def _encoded(
    items: Iterator[Record | Reject], deny: DenyList, encode: Encode
) -> Iterator[Reject | tuple[Record, Encoded]]:
    """Records with their tokens, in batches; rejects pass through."""
    while batch := list(islice(items, BATCH_RECORDS)):
        checked = [x if isinstance(x, Reject) else deny.check(x) for x in batch]
        records = [x for x in checked if not isinstance(x, Reject)]
        yield from (x for x in checked if isinstance(x, Reject))
        for record, encoded in zip(records, encode(records), strict=True):
            yield encoded if isinstance(encoded, Reject) else (record, encoded)


def content_hash(record: Record) -> str:
    """32 hexadecimal characters of what the record says, wherever it stands."""
    text = (
        json.dumps([(m.role, m.content) for m in record.messages], ensure_ascii=False)
        if isinstance(record, Conversation)
        else record.text
    )
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def is_validation(content: str, share: float) -> bool:
    """Equal contents always fall on the same side."""
    return int(content[:8], 16) < share * 2**32


def unit_digest(unit: Unit) -> str:
    """xxHash of the bytes of the file that the unit belongs to (of its range, if it has one)."""
    fs, path = Folder(unit.file).fs, Folder(unit.file).root
    by_bytes = unit.format in ("txt", "jsonl") and unit.stop is not None
    start, stop = (unit.start, unit.stop) if by_bytes else (0, fs.size(path))
    digest = xxhash.xxh3_128()
    with fs.open(path, "rb") as file:
        file.seek(start)
        left = stop - start
        while left > 0 and (block := file.read(min(left, 1 << 22))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def fingerprint(units: Sequence[Unit], digests: Sequence[str]) -> list[dict[str, Any]]:
    """What was read, in order."""
    return [
        {"file": u.file, "start": u.start, "stop": u.stop, "xxh128": digest}
        for u, digest in zip(units, digests, strict=True)
    ]


def _kind(reason: str) -> str:
    """The reason without its numbers, to count by."""
    return re.sub(r"\d+", "N", reason)


def _by_source(
    config: DataConfig, units: Sequence[Unit], results: Sequence[dict[str, Any]]
) -> dict[str, Account]:
    accounts = {source.name: Account() for source in config.sources}
    for unit, result in zip(units, results, strict=True):
        accounts[unit.source].add(Account(**result["account"]))
    return accounts


def _refuse_malformed(job: IndexJob, accounts: dict[str, Account]) -> None:
    limit = job.config.max_malformed_share
    for name, account in accounts.items():
        if account.malformed > limit * account.rows:
            raise ConfigError(
                f"data.sources {name}: {account.malformed} of {account.rows} rows are malformed, "
                f"more than data.max_malformed_share={limit}; most frequent: "
                f"{_most_common(Counter(account.set_aside))}. File and row of each are in {job.rejected_url}"
            )


def _refuse_empty(job: IndexJob, accounts: dict[str, Account], num_samples: int) -> None:
    if num_samples:
        return
    reasons: Counter[str] = Counter()
    for account in accounts.values():
        reasons.update(account.set_aside)
    raise ConfigError(
        f"data.sources: no row is left to train on with data.max_length={job.config.max_length}; "
        f"most frequent reasons: {_most_common(reasons) or 'the files are empty'}"
    )


def _most_common(reasons: Counter[str]) -> str:
    return "; ".join(f"{reason} ({count} rows)" for reason, count in reasons.most_common(3))


def _totals(folder: Folder, split: str, config: DataConfig) -> dict[str, Any]:
    index = read_index(folder, split)
    by_source = np.bincount(index.source, weights=index.length, minlength=len(config.sources))
    return {
        "num_samples": len(index),
        "num_chunks": int(num_chunks(index.length, config.max_length).sum()),
        "num_tokens": int(index.length.sum()),
        "tokens_by_source": {s.name: int(n) for s, n in zip(config.sources, by_source, strict=True)},
        "dropped_tail_tokens": 0,
    }

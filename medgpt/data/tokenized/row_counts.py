"""Counts what became of every row, and raises errors when too many were bad."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from medgpt.config.base import ConfigError
from medgpt.config.data import DataConfig
from medgpt.data.sources.file_slices import FileSlice
from medgpt.data.sources.records import Conversation, Record, Reject

if TYPE_CHECKING:
    from medgpt.data.tokenized.encode import EncodedSample

NUM_SHOWN = 3  # reasons or files listed in an error
MAX_UNUSED = 50  # names; keys that are data would fill the manifest
OTHER_UNUSED = "other columns and keys"


@dataclass
class RowCounts:
    """Row counts of a slice or a source: rows = train + validation + sum of set_aside.

    A conversation is one row, and may become several samples: see `parts`.
    """

    rows: int = 0
    train: int = 0
    validation: int = 0
    malformed: int = 0  # subset of set_aside
    trimmed_turns: int = 0  # messages before the first and after the last exchange
    truncated_turns: int = 0  # messages removed so that a conversation fits max_length
    samples: int = 0  # of the rows in train and validation
    unreadable_files: list[str] = field(default_factory=list)  # "FILE, row N: REASON"
    set_aside: dict[str, int] = field(default_factory=dict)  # reason -> rows
    changes: dict[str, int] = field(default_factory=dict)  # what was removed or moved -> how many
    unused: dict[str, int] = field(default_factory=dict)  # column or key that nothing read -> rows

    def add(self, counts: "RowCounts") -> None:
        self.rows += counts.rows
        self.train += counts.train
        self.validation += counts.validation
        self.malformed += counts.malformed
        self.trimmed_turns += counts.trimmed_turns
        self.truncated_turns += counts.truncated_turns
        self.samples += counts.samples
        self.changes = dict(Counter(self.changes) + Counter(counts.changes))
        self.unreadable_files = self.unreadable_files + counts.unreadable_files
        self.set_aside = dict(Counter(self.set_aside) + Counter(counts.set_aside))
        self.unused = dict(Counter(self.unused) + Counter(counts.unused))

    def count_sample(
        self, record: Record, encoded: "EncodedSample", *, is_validation: bool
    ) -> None:
        """Count a row that becomes a sample."""
        self.rows += 1
        self.train += not is_validation
        self.validation += is_validation
        samples = (encoded, *encoded.further)
        self.samples += len(samples)
        self.truncated_turns += sum(sample.num_truncated_turns for sample in samples)
        self.changes = dict(Counter(self.changes) + Counter(encoded.changes))
        for name in record.unused:
            name = name if name in self.unused or len(self.unused) < MAX_UNUSED else OTHER_UNUSED
            self.unused[name] = self.unused.get(name, 0) + 1
        if isinstance(record, Conversation):
            self.trimmed_turns += record.num_trimmed

    def count_reject(self, reject: Reject) -> None:
        """Count a row that is set aside. Numbers in its reason become N."""
        self.rows += 1
        self.malformed += reject.malformed
        reason = re.sub(r"\d+", "N", reject.reason)
        self.set_aside[reason] = self.set_aside.get(reason, 0) + 1
        if reject.unreadable:
            self.unreadable_files.append(f"{reject.file}, row {reject.row}: {reject.reason}")


def sum_by_source(
    config: DataConfig,
    slices: Sequence[FileSlice],
    slice_counts: Sequence[RowCounts],
    *,
    rejected_url: str,
) -> dict[str, RowCounts]:
    """Add up slices per source. Raises ConfigError if a source has too many bad rows or slices."""
    source_counts = {source.name: RowCounts() for source in config.sources}
    for file_slice, counts in zip(slices, slice_counts, strict=True):
        source_counts[file_slice.source].add(counts)
    num_slices = Counter(file_slice.source for file_slice in slices)
    for name, counts in source_counts.items():
        num_samples = counts.train + counts.validation
        assert counts.rows == num_samples + sum(counts.set_aside.values()), (
            f"{name} lost rows: {counts}"
        )
        _refuse_unreadable(name, counts, num_slices[name], config.max_malformed_share)
        _refuse_malformed(name, counts, config.max_malformed_share, rejected_url)
    return source_counts


def _refuse_unreadable(name: str, counts: RowCounts, total: int, limit: float) -> None:
    unreadable = counts.unreadable_files
    if len(unreadable) > limit * total:
        raise ConfigError(
            f"data.sources {name}: {len(unreadable)} of {total} pieces of files cannot be read to "
            f"their end: {'; '.join(unreadable[:NUM_SHOWN])}. Restore or remove the files; to "
            f"train on the rest, raise data.max_malformed_share={limit} to "
            f"{math.ceil(100 * len(unreadable) / total) / 100}"
        )


def _refuse_malformed(name: str, counts: RowCounts, limit: float, rejected_url: str) -> None:
    if counts.malformed > limit * counts.rows:
        raise ConfigError(
            f"data.sources {name}: {counts.malformed} of {counts.rows} rows are malformed, more "
            f"than data.max_malformed_share={limit}; most frequent: "
            f"{most_common(counts.set_aside)}. File, row and reason of each are in {rejected_url}"
        )


def refuse_empty(source_counts: Mapping[str, RowCounts], config: DataConfig) -> None:
    """Raise ConfigError if no row is left to train on, or none of a source with a weight."""
    if not sum(counts.train for counts in source_counts.values()):
        reasons: Counter[str] = Counter()
        for counts in source_counts.values():
            reasons.update(counts.set_aside)
        raise ConfigError(
            f"data.sources: no row is left to train on with data.max_length={config.max_length}; "
            f"most frequent reasons: {most_common(reasons) or 'the files are empty'}"
        )
    for source in config.sources:
        if source.weight is not None and not source_counts[source.name].train:
            raise ConfigError(
                f"data.sources {source.name} weight={source.weight:g}: no row of it is left to "
                "train on, so the shares cannot be kept; repair or remove the source"
            )


def most_common(reasons: Mapping[str, int]) -> str:
    frequent = Counter(reasons).most_common(NUM_SHOWN)
    return "; ".join(f"{reason} ({count} rows)" for reason, count in frequent)

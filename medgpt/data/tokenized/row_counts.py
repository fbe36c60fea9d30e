"""Where every row went, and when too few of them were good."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from medgpt.config.base import ConfigError
from medgpt.config.data import DataConfig
from medgpt.data.sources.records import Conversation, Record, Reject
from medgpt.data.sources.units import Unit

if TYPE_CHECKING:
    from medgpt.data.tokenized.encode import Encoded

SHOWN = 3  # reasons or files in an error


@dataclass
class Account:
    """Rows of a unit or a source: rows = train + validation + sum of set_aside."""

    rows: int = 0
    train: int = 0
    validation: int = 0
    malformed: int = 0  # of those set aside
    trimmed_turns: int = 0  # messages outside the first and the last exchange
    truncated_turns: int = 0  # messages left out so that a conversation fits
    unreadable_files: list[str] = field(default_factory=list)  # file, row it broke at, reason
    set_aside: dict[str, int] = field(default_factory=dict)  # reason -> rows

    def add(self, other: "Account") -> None:
        self.rows += other.rows
        self.train += other.train
        self.validation += other.validation
        self.malformed += other.malformed
        self.trimmed_turns += other.trimmed_turns
        self.truncated_turns += other.truncated_turns
        self.unreadable_files = self.unreadable_files + other.unreadable_files
        self.set_aside = dict(Counter(self.set_aside) + Counter(other.set_aside))

    def keep(self, record: Record, encoded: "Encoded", *, held_out: bool) -> None:
        """Count a row that becomes a sample."""
        self.rows += 1
        self.train += not held_out
        self.validation += held_out
        self.truncated_turns += encoded.num_truncated_turns
        if isinstance(record, Conversation):
            self.trimmed_turns += record.num_trimmed

    def reject(self, reject: Reject) -> None:
        """Count a row that is set aside, under its reason without numbers."""
        self.rows += 1
        self.malformed += reject.malformed
        reason = re.sub(r"\d+", "N", reject.reason)
        self.set_aside[reason] = self.set_aside.get(reason, 0) + 1
        if reject.unreadable:
            self.unreadable_files.append(f"{reject.file}, row {reject.row}: {reject.reason}")


def by_source(
    config: DataConfig, units: Sequence[Unit], accounts: Sequence[Account], *, rejected_url: str
) -> dict[str, Account]:
    """Accounts of units added up. Raises ConfigError if a source has too many bad rows or units."""
    sources = {source.name: Account() for source in config.sources}
    for unit, account in zip(units, accounts, strict=True):
        sources[unit.source].add(account)
    num_units = Counter(unit.source for unit in units)
    for name, account in sources.items():
        held = account.train + account.validation
        assert account.rows == held + sum(account.set_aside.values()), (
            f"{name} lost rows: {account}"
        )
        _refuse_unreadable(name, account, num_units[name], config.max_malformed_share)
        _refuse_malformed(name, account, config.max_malformed_share, rejected_url)
    return sources


def _refuse_unreadable(name: str, account: Account, num_units: int, limit: float) -> None:
    broken = account.unreadable_files
    if len(broken) > limit * num_units:
        raise ConfigError(
            f"data.sources {name}: {len(broken)} of {num_units} pieces of files cannot be read to "
            f"their end: {'; '.join(broken[:SHOWN])}. Restore or remove the files; to train on the "
            f"rest, raise data.max_malformed_share={limit} to {_above(len(broken) / num_units)}"
        )


def _refuse_malformed(name: str, account: Account, limit: float, rejected_url: str) -> None:
    if account.malformed > limit * account.rows:
        raise ConfigError(
            f"data.sources {name}: {account.malformed} of {account.rows} rows are malformed, more "
            f"than data.max_malformed_share={limit}; most frequent: "
            f"{most_common(account.set_aside)}. File, row and reason of each are in {rejected_url}"
        )


def _above(share: float) -> float:
    """`share` in per cent, rounded up."""
    return -(-share * 100 // 1) / 100


def refuse_empty(accounts: Mapping[str, Account], config: DataConfig) -> None:
    """Raises ConfigError if no row is left, or none of a source that has a weight."""
    if not sum(account.train for account in accounts.values()):
        reasons: Counter[str] = Counter()
        for account in accounts.values():
            reasons.update(account.set_aside)
        raise ConfigError(
            f"data.sources: no row is left to train on with data.max_length={config.max_length}; "
            f"most frequent reasons: {most_common(reasons) or 'the files are empty'}"
        )
    for source in config.sources:
        if source.weight is not None and not accounts[source.name].train:
            raise ConfigError(
                f"data.sources {source.name} weight={source.weight:g}: no row of it is left to "
                "train on, so the shares cannot be kept; repair or remove the source"
            )


def most_common(reasons: Mapping[str, int]) -> str:
    frequent = Counter(reasons).most_common(SHOWN)
    return "; ".join(f"{reason} ({count} rows)" for reason, count in frequent)

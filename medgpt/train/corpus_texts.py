"""Reads texts of a run's sources: to train its tokenizer, and to measure a changed vocabulary."""

from collections.abc import Iterator
from itertools import islice
from typing import Protocol

from medgpt.config.data import DataConfig, SourceConfig
from medgpt.config.model import TokenizerConfig
from medgpt.data.sources.deny_list import DenyList
from medgpt.data.sources.file_slices import FileSlice, list_slices
from medgpt.data.sources.readers import read_slice
from medgpt.data.sources.records import Document, Reject

PROBE_TEXTS_PER_SOURCE = 4  # to measure a changed vocabulary
PROBE_CHARACTERS = 200


class CorpusConfig(Protocol):
    """A stage config with a corpus."""

    @property
    def tokenizer(self) -> TokenizerConfig: ...
    @property
    def data(self) -> DataConfig: ...


def corpus_texts(config: CorpusConfig) -> Iterator[str]:
    """Yield texts of all sources, at most `tokenizer.max_train_mb`, in equal shares per unit."""
    sources = config.data.sources
    for source in sources:
        units = list_slices(source, config.data.shard_mb)
        budget = config.tokenizer.max_train_mb * 2**20 / len(sources) / len(units)
        deny = DenyList.load(source.deny)
        for unit in units:
            bytes_left = budget
            for text in _unit_texts(unit, source, deny):
                yield text
                bytes_left -= len(text.encode())
                if bytes_left <= 0:
                    break


def probe_texts(config: CorpusConfig) -> Iterator[str]:
    """Yield the beginnings of the first texts of every source."""
    for source in config.data.sources:
        units, deny = list_slices(source, config.data.shard_mb), DenyList.load(source.deny)
        texts = (text for unit in units for text in _unit_texts(unit, source, deny))
        yield from (text[:PROBE_CHARACTERS] for text in islice(texts, PROBE_TEXTS_PER_SOURCE))


def _unit_texts(unit: FileSlice, source: SourceConfig, deny: DenyList) -> Iterator[str]:
    """Yield documents and the messages of conversations."""
    for item in read_slice(unit, source):
        record = item if isinstance(item, Reject) else deny.check(item)
        if isinstance(record, Document):
            yield record.text
        elif not isinstance(record, Reject):
            yield from (message.text for message in record.messages)

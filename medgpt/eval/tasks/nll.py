"""Negative log-likelihood of held-out texts, by source."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files

from medgpt.config.base import ConfigError
from medgpt.config.data import SourceConfig
from medgpt.config.evaluation import NllConfig
from medgpt.data.sources.readers import read_records
from medgpt.data.sources.records import Document
from medgpt.data.sources.sampling import draw_subset, hash_texts
from medgpt.eval.requests import (
    Request,
    Response,
    RollingLoglikelihood,
    RollingLoglikelihoodResponse,
)
from medgpt.eval.task import NO_RULES, ItemResult

GENERAL_SOURCES = ("general_zh", "general_en")
MIN_PASSAGE_CHARS = 500  # of an item of the shipped prose


class NllTask:
    """Nats per token and per character.

    The first token of a text counts only if the tokenizer puts a start token before it.
    """

    kind = "nll"

    def __init__(self, config: NllConfig, seed: int) -> None:
        """Raises ConfigError if a source cannot be read or has no text."""
        self.name, self.sensitive = config.name, config.sensitive
        sources = {source.name: _source_texts(source) for source in config.sources}
        if config.general:
            sources |= {name: general_passages(name) for name in GENERAL_SOURCES}
        self.texts: dict[str, tuple[str, str]] = {}  # (source, text) by id
        for source, texts in sources.items():
            by_id = _by_id(source, texts)
            for key in draw_subset(((key, key) for key in by_id), config.limit, seed):
                self.texts[key] = (source, by_id[key])
        self.template, self.rules = "nll", NO_RULES
        self.data_hash = hash_texts(*self.texts)

    def requests(self) -> Sequence[Request]:
        return [RollingLoglikelihood(key, text) for key, (_, text) in self.texts.items()]

    def grade(self, responses: Mapping[str, Response]) -> list[ItemResult]:
        items = []
        for key, (source, _) in self.texts.items():
            response = responses[key]
            assert isinstance(response, RollingLoglikelihoodResponse)
            values = {}
            if response.tokens:  # a text of one token has no scored token
                values["nll_per_token"] = (response.nll, float(response.tokens))
            if response.characters:
                values["nll_per_character"] = (response.nll, float(response.characters))
            text_kind = "general" if source in GENERAL_SOURCES else "held_out"
            items.append(ItemResult(key, values, {"source": source, "text": text_kind}))
        return items


def _by_id(source: str, texts: Iterator[str]) -> dict[str, str]:
    """Return texts by id: the content hash and the occurrence number of the text."""
    occurrences: Counter[str] = Counter()
    by_id = {}
    for text in texts:
        digest = hash_texts(text)
        occurrences[digest] += 1
        by_id[f"{source}-{digest}-{occurrences[digest]}"] = text
    if not by_id:
        raise ConfigError(f"source {source} has no text; give files with at least one")
    return by_id


def _source_texts(source: SourceConfig) -> Iterator[str]:
    """Yield documents, and conversations with one line per turn, without denied records."""
    for record in read_records(source):
        if isinstance(record, Document):
            yield record.text
        else:
            yield "\n".join(message.text for message in record.messages)


def general_passages(name: str) -> Iterator[str]:
    """Yield the shipped prose in passages of whole paragraphs."""
    file = files("medgpt.eval") / "general" / f"{name.removeprefix('general_')}.txt"
    passage = ""
    for paragraph in file.read_text("utf-8").split("\n\n"):
        passage += paragraph.strip() + "\n"
        if len(passage) >= MIN_PASSAGE_CHARS:
            yield passage
            passage = ""
    if passage.strip():
        yield passage

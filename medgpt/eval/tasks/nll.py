"""How likely the model finds texts, by source."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files

from medgpt.config.base import ConfigError
from medgpt.config.data import SourceConfig
from medgpt.config.evaluation import NllConfig
from medgpt.data.sources.records import Document
from medgpt.data.sources.rows import content_hash, draw, records
from medgpt.eval.requests import Request, Response, Weigh, Weighed
from medgpt.eval.task import LIKELIHOOD, ItemResult

GENERAL = ("general_zh", "general_en")
PIECE = 500  # characters of the general texts in an item, at least


class NllTask:
    """Nats per token and per character. The first token of a text counts only if the tokenizer
    puts a start token before it, so that there is something it follows."""

    kind = "nll"

    def __init__(self, config: NllConfig, seed: int) -> None:
        """Raises ConfigError: a source cannot be read or has no text."""
        self.name, self.sensitive = config.name, config.sensitive
        sources = {source.name: _texts(source) for source in config.sources}
        if config.general:
            sources |= {name: general_texts(name) for name in GENERAL}
        self.texts: dict[str, tuple[str, str]] = {}  # (source, text) by id
        for source, texts in sources.items():
            pairs = _numbered(source, texts)
            for key, text in draw(((key, (key, text)) for key, text in pairs), config.limit, seed):
                self.texts[key] = (source, text)
        self.template, self.rules = "nll", LIKELIHOOD
        self.data_hash = content_hash(*self.texts)

    def requests(self) -> Sequence[Request]:
        return [Weigh(key, text) for key, (_, text) in self.texts.items()]

    def judge(self, responses: Mapping[str, Response]) -> list[ItemResult]:
        judged = []
        for key, (source, _) in self.texts.items():
            response = responses[key]
            assert isinstance(response, Weighed)
            values = {}
            if response.tokens:  # a text of one token has nothing that follows anything
                values["nll_per_token"] = (response.nll, float(response.tokens))
            if response.characters:
                values["nll_per_character"] = (response.nll, float(response.characters))
            text = "general" if source in GENERAL else "held_out"
            judged.append(ItemResult(key, values, {"source": source, "text": text}))
        return judged


def _numbered(source: str, texts: Iterator[str]) -> list[tuple[str, str]]:
    """(id, text): the id is a hash of the content, and its number among equal ones."""
    seen: Counter[str] = Counter()
    found = []
    for text in texts:
        digest = content_hash(text)
        seen[digest] += 1
        found.append((f"{source}-{digest}-{seen[digest]}", text))
    if not found:
        raise ConfigError(f"source {source} has no text; name files with at least one")
    return found


def _texts(source: SourceConfig) -> Iterator[str]:
    """Documents, and conversations with a line for each turn, without what deny-lists set aside."""
    for record in records(source):
        if isinstance(record, Document):
            yield record.text
        else:
            yield "\n".join(message.content for message in record.messages)


def general_texts(name: str) -> Iterator[str]:
    """The shipped prose in pieces of whole paragraphs."""
    text = (files("medgpt.eval") / "general" / f"{name.removeprefix('general_')}.txt").read_text(
        "utf-8"
    )
    piece = ""
    for paragraph in text.split("\n\n"):
        piece += paragraph.strip() + "\n"
        if len(piece) >= PIECE:
            yield piece
            piece = ""
    if piece.strip():
        yield piece

"""Deny-lists: rules for claims and advice that no model should learn.

A rule matches a sentence that contains one of its `any` phrases, one of its `with` phrases (if it
has some) and none of its `unless` phrases, which identify a warning against the claim. `…` inside a
phrase matches up to 8 characters of one clause; `@name` stands for the phrases of a set.
"""

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Annotated

from annotated_types import Len
from pydantic import Field, StringConstraints

from medgpt.config.base import Config, ConfigError, Name
from medgpt.config.loading import validate
from medgpt.data.sources.files import open_file
from medgpt.data.sources.records import Document, Record, Reject

PhraseText = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
GAP_REGEX = "[^，,。！？!?；;：:\n]{0,8}?"
SENTENCE_END = re.compile(r"[。！？!?；;\n]+|\.(?=\s|$)")


class RuleConfig(Config):
    id: Name
    """Name of the rule in reports."""
    reason: PhraseText
    """Why the model is not trained on such text."""
    source: PhraseText
    """Guideline or regulation, with its year."""
    any: Annotated[tuple[PhraseText, ...], Len(1)]
    """Phrases of which the sentence must contain one."""
    with_: tuple[PhraseText, ...] = Field((), alias="with")
    """Phrases of which the same sentence must also contain one."""
    unless: tuple[PhraseText, ...] = ()
    """Phrases that exempt the sentence."""


class DenyConfig(Config):
    """Schema of deny.toml."""

    sets: dict[str, tuple[PhraseText, ...]] = Field(default_factory=dict)
    """Sets of phrases that several rules share, by name."""
    rules: Annotated[tuple[RuleConfig, ...], Len(1)]


@dataclass(frozen=True, slots=True)
class Rule:
    id: str
    literals: tuple[str, ...]  # the longest word of each `any` phrase; a fast first search
    any: re.Pattern[str]
    with_: re.Pattern[str] | None
    unless: re.Pattern[str] | None

    def matches(self, sentence: str) -> bool:
        if not self.any.search(sentence) or (self.with_ and not self.with_.search(sentence)):
            return False
        return not (self.unless and self.unless.search(sentence))


class DenyList:
    """The combined rules of several deny-lists."""

    def __init__(self, rules: Iterable[RuleConfig]) -> None:
        self.rules = [
            Rule(
                rule.id,
                tuple(_longest_word(phrase) for phrase in rule.any),
                _compile_phrases(rule.any),
                _compile_phrases(rule.with_) if rule.with_ else None,
                _compile_phrases(rule.unless) if rule.unless else None,
            )
            for rule in rules
        ]

    @classmethod
    @cache
    def load(cls, names: tuple[str, ...]) -> "DenyList":
        """Load `default`, the shipped list, and TOML files by path. Raises ConfigError."""
        rules = [rule for name in names for rule in _read_rules(name)]
        seen_ids: set[str] = set()
        for rule in rules:
            if rule.id in seen_ids:
                raise ConfigError(f"deny={names}: two rules have the id {rule.id}; rename one")
            seen_ids.add(rule.id)
        return cls(rules)

    def match(self, text: str) -> str | None:
        """Return the id of the first rule that a sentence of `text` breaks, or None."""
        text = text.lower()
        rules = [r for r in self.rules if any(literal in text for literal in r.literals)]
        if not rules:
            return None
        broken = (r.id for part in SENTENCE_END.split(text) for r in rules if r.matches(part))
        return next(broken, None)

    def check(self, record: Record) -> Record | Reject:
        """Return `record`, or a reject if a document or an answer breaks a rule.

        Questions of users are not checked.
        """
        if isinstance(record, Document):
            texts = [record.text]
        else:
            texts = [m.text for m in record.messages if m.role == "assistant"]
        rule = next((rule for text in texts if (rule := self.match(text))), None)
        if rule is None:
            return record
        return Reject.of(record, f"deny-list: {rule}", malformed=False)


def _read_rules(name: str) -> list[RuleConfig]:
    try:
        if name == "default":
            data = resources.files("medgpt.data.sources").joinpath("deny.toml").read_bytes()
        else:
            with open_file(name) as stream:
                data = stream.read()
        return _expand_sets(validate(DenyConfig, tomllib.loads(data.decode("utf-8"))))
    except FileNotFoundError:
        raise ConfigError(f"deny={name!r}: no such file; `default` is the shipped list") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"deny={name!r}: is not a TOML file: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"deny={name!r}: {error}; see medgpt/data/sources/deny.toml") from None


def _expand_sets(config: DenyConfig) -> list[RuleConfig]:
    """Replace the names of sets in the rules by their phrases."""
    sets = {f"@{name}": phrases for name, phrases in config.sets.items()}

    def phrases(names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in names if name.startswith("@") and name not in sets]
        if unknown:
            raise ConfigError(f"no set {unknown[0]!r}; known: {', '.join(sets)}")
        return tuple(phrase for name in names for phrase in sets.get(name, (name,)))

    keys = ("any", "with_", "unless")
    return [
        rule.model_copy(update={key: phrases(getattr(rule, key)) for key in keys})
        for rule in config.rules
    ]


def _compile_phrases(phrases: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(_phrase_regex(phrase.lower()) for phrase in phrases))


def _longest_word(phrase: str) -> str:
    return max(phrase.lower().replace("…", " ").split(), key=len)


def _phrase_regex(phrase: str) -> str:
    """Return the pattern of a phrase; Latin phrases match whole words only."""
    parts = [r"\s+".join(map(re.escape, part.split())) for part in phrase.split("…")]
    before = "(?<![a-z0-9])" if phrase[0].isascii() and phrase[0].isalnum() else ""
    after = "(?![a-z0-9])" if phrase[-1].isascii() and phrase[-1].isalnum() else ""
    return before + GAP_REGEX.join(parts) + after

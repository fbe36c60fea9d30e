"""Whether two models read the same token ids: tokenizer and chat template side by side."""

import json
from typing import Any

import xxhash
from transformers import PreTrainedTokenizerFast

from medgpt.config.base import ConfigError

SHOWN = 3  # differences in an error


def speech(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Digests of what turns a conversation into ids, which a saved reward model keeps."""
    return {
        "tokenizer": _digest(json.dumps(_rules(tokenizer), sort_keys=True)),
        "template": _digest(str(tokenizer.chat_template)),
    }


def check_same_speech(
    one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast, *, names: tuple[str, str]
) -> None:
    """Raise ConfigError, with the differences, unless ids of `one` mean the same to `other`.

    `names` says whose tokenizers these are, as in ("the actor", "reward.model=runs/reward/model").
    """
    found = differences(one, other)
    if found:
        raise ConfigError(
            f"{names[0]} and {names[1]} do not read the same token ids: {'; '.join(found)}. Train "
            "both from one SFT model"
        )


def differences(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> list[str]:
    """In words, a few at most; none if both turn every conversation into the same ids."""
    ours, theirs = one.get_vocab(), other.get_vocab()
    differing = sorted(ours.items() ^ theirs.items(), key=lambda item: (item[1], item[0]))
    tokens = list(dict.fromkeys(token for token, _ in differing))
    found = []
    if tokens:
        some = ", ".join(
            f"{token!r} is {ours.get(token, 'none')} and {theirs.get(token, 'none')}"
            for token in tokens[:SHOWN]
        )
        found.append(f"{len(tokens)} tokens have other ids, as {some}")
    mine, its = _rules(one), _rules(other)
    parts = [name for name in mine if name != "model" and mine[name] != its.get(name)]
    if mine["model"] != its["model"] and not tokens:
        parts.append("model")
    if parts:
        found.append(f"their tokenizers differ in {', '.join(parts)}")
    if one.chat_template != other.chat_template:
        found.append(_template_difference(str(one.chat_template), str(other.chat_template)))
    return found


def _template_difference(one: str, other: str) -> str:
    same = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
    return (
        f"their chat templates differ from character {same + 1} on: {one[same : same + 30]!r} and "
        f"{other[same : same + 30]!r}"
    )


def _rules(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """All that decides the ids of a text; padding and truncation do not."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")}


def _digest(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())

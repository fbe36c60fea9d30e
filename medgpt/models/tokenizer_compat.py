"""Compare the tokenizers and chat templates of two models that exchange token ids."""

import json
from typing import Any

import xxhash
from transformers import PreTrainedTokenizerFast

from medgpt.config.base import ConfigError
from medgpt.models.tokenizer import common_prefix_length

MAX_SHOWN = 3  # differences in an error


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Return digests of the tokenizer's rules and its chat template; stored with reward models."""
    return {
        "tokenizer": _digest(json.dumps(_tokenization_rules(tokenizer), sort_keys=True)),
        "template": _digest(str(tokenizer.chat_template)),
    }


def check_same_token_ids(
    first: PreTrainedTokenizerFast, second: PreTrainedTokenizerFast, *, names: tuple[str, str]
) -> None:
    """Raise ConfigError, listing the differences, unless both turn conversations into the same ids.

    Args:
        names: owners of the tokenizers, such as ("the actor", "reward.model=runs/reward/model").
    """
    problems = tokenizer_differences(first, second)
    if problems:
        raise ConfigError(
            f"{names[0]} and {names[1]} do not read the same token ids: {'; '.join(problems)}. "
            "Train both from one SFT model"
        )


def tokenizer_differences(
    first: PreTrainedTokenizerFast, second: PreTrainedTokenizerFast
) -> list[str]:
    """Describe the differences, a sentence each; empty if every conversation gets the same ids."""
    first_ids, second_ids = first.get_vocab(), second.get_vocab()
    differing = sorted(first_ids.items() ^ second_ids.items(), key=lambda item: (item[1], item[0]))
    tokens = list(dict.fromkeys(token for token, _ in differing))
    sentences = []
    if tokens:
        some = ", ".join(
            f"{token!r} is {first_ids.get(token, 'none')} and {second_ids.get(token, 'none')}"
            for token in tokens[:MAX_SHOWN]
        )
        sentences.append(f"{len(tokens)} tokens have other ids, such as {some}")
    first_rules, second_rules = _tokenization_rules(first), _tokenization_rules(second)
    parts = [
        name
        for name in first_rules
        if name != "model" and first_rules[name] != second_rules.get(name)
    ]
    if first_rules["model"] != second_rules["model"] and not tokens:
        parts.append("model")
    if parts:
        sentences.append(f"their tokenizers differ in {', '.join(parts)}")
    if first.chat_template != second.chat_template:
        sentences.append(_template_difference(str(first.chat_template), str(second.chat_template)))
    return sentences


def _template_difference(first: str, second: str) -> str:
    same = common_prefix_length([first, second])
    return (
        f"their chat templates differ from character {same + 1} on: {first[same : same + 30]!r} "
        f"and {second[same : same + 30]!r}"
    )


def _tokenization_rules(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return tokenizer.json without padding and truncation, which do not change the ids."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: rule for name, rule in rules.items() if name not in ("padding", "truncation")}


def _digest(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())

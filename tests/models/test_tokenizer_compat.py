"""Tokenizers that give a conversation different ids are recognized as different."""

import copy

import pytest

from medgpt.config.base import ConfigError
from medgpt.config.model import TokenizerConfig
from medgpt.models.tokenizer import train_tokenizer
from medgpt.models.tokenizer_compat import check_same_token_ids, tokenizer_fingerprint

TEXTS = ["头痛两天，没有发热。", "A headache for two days."]
NAMES = ("the actor", "reward.model=runs/reward/model")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(iter(TEXTS), TokenizerConfig(vocab_size=300), "bpe")


def test_padding_makes_no_difference(tokenizer):
    other = copy.deepcopy(tokenizer)
    other(["a", "bc d"], padding=True, truncation=True, max_length=3)

    check_same_token_ids(tokenizer, other, names=NAMES)
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(other)


def test_another_vocabulary_is_refused_with_the_tokens_that_differ(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["偏头痛"])

    with pytest.raises(ConfigError, match=r"the actor and reward\.model=.* 1 tokens .*'偏头痛'"):
        check_same_token_ids(tokenizer, other, names=NAMES)
    assert (
        tokenizer_fingerprint(tokenizer)["tokenizer"] != tokenizer_fingerprint(other)["tokenizer"]
    )


def test_another_template_is_refused_with_the_differing_position(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template[:10] + "X" + tokenizer.chat_template[11:]

    with pytest.raises(ConfigError, match="chat templates differ from character 11 on"):
        check_same_token_ids(tokenizer, other, names=NAMES)
    assert tokenizer_fingerprint(tokenizer)["template"] != tokenizer_fingerprint(other)["template"]


def test_other_rules_over_the_same_tokens_are_refused(tokenizer):
    from tokenizers import normalizers

    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.normalizer = normalizers.Lowercase()

    with pytest.raises(ConfigError, match="differ in normalizer"):
        check_same_token_ids(tokenizer, other, names=NAMES)

"""Small tokenizers with the chat template and the special tokens of a model family."""

from functools import cache
from typing import Literal

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from medgpt.config.model import TokenizerConfig
from medgpt.data.tokenized.chat_template import prepare_chat_tokenizer
from medgpt.data.tokenized.template_choice import freeze_template
from medgpt.models.tokenizer import train_tokenizer
from tests.models.chat_templates import CHAT_TEMPLATES, SPECIAL_TOKENS

TEXTS = ["我头痛3天了，请测量体温。先排除危险信号。", "See a doctor today! No fever.\n\n\n"] * 3


@cache
def _backend() -> str:
    return train_tokenizer(
        iter(TEXTS), TokenizerConfig(vocab_size=400), "bpe"
    ).backend_tokenizer.to_str()


def base_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with the template and tokens of the family."""
    tokens = SPECIAL_TOKENS[family]

    def special(text: str | None) -> AddedToken | None:
        return None if text is None else AddedToken(text, special=True, normalized=False)

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend()),
        bos_token=special(tokens.bos),
        eos_token=special(tokens.eos),
        extra_special_tokens=[special(text) for text in tokens.extra],
        clean_up_tokenization_spaces=False,
    )
    plain = [AddedToken(text, special=False, normalized=False) for text in tokens.plain]
    tokenizer.add_tokens(plain)
    tokenizer.chat_template = CHAT_TEMPLATES[family]
    return tokenizer


def chat_tokenizer(
    family: str, thinking: Literal["auto", "on", "off"] = "auto"
) -> PreTrainedTokenizerFast:
    """Return the tokenizer that a run makes of it. Raises ConfigError if it has no such mode."""
    tokenizer = base_tokenizer(family)
    return prepare_chat_tokenizer(freeze_template(tokenizer, TokenizerConfig(thinking=thinking)))

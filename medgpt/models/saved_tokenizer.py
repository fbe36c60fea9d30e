"""Load a tokenizer that medgpt saved by its class.

AutoTokenizer, which finds the class, imports torch: seconds in every process that tokenizes.
"""

import importlib

from transformers import PreTrainedTokenizerFast


def tokenizer_class_path(folder: str, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Return the `module:class` that loads the same tokenizer as AutoTokenizer, or None."""
    cls = type(tokenizer)
    if cls.__module__.partition(".")[0] != "transformers":
        return None  # remote code of a model
    path = f"{cls.__module__}:{cls.__qualname__}"
    return path if _behavior(load_by_class_path(folder, path)) == _behavior(tokenizer) else None


def load_by_class_path(folder: str, path: str) -> PreTrainedTokenizerFast:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name).from_pretrained(folder)


def _behavior(tokenizer: PreTrainedTokenizerFast) -> tuple[object, ...]:
    """Return everything that determines how the tokenizer encodes and decodes."""
    return (
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        tokenizer.padding_side,
        tokenizer.truncation_side,
        tokenizer.model_max_length,
        tokenizer.clean_up_tokenization_spaces,
    )

"""Where a model stops by itself: the ids that end its answers, in its config and for generate()."""

from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerFast

from medgpt.data.tokenized.chat_template import stop_token_ids
from medgpt.models.tokenizer import end_token_id


def document_stop_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids that end a continued document."""
    if tokenizer.chat_template:
        return stop_token_ids(tokenizer)
    return [end_token_id(tokenizer)]


def generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Return the config that makes transformers' generate() stop at the right tokens."""
    return GenerationConfig(
        eos_token_id=document_stop_ids(tokenizer), pad_token_id=tokenizer.pad_token_id
    )


def set_stops(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Make plain transformers and other engines stop a causal model where its template does.

    A base model may end at <|endoftext|> only, and would go on after <|im_end|>. The ends that its
    own generation config names are kept: what it learned to end with, it may still say.
    """
    if model.can_generate():
        own = model.generation_config.eos_token_id
        model.generation_config = generation_config(tokenizer)
        own_ends = [own] if isinstance(own, int) else own or []
        ends = {*model.generation_config.eos_token_id, *own_ends}
        model.generation_config.eos_token_id = sorted(ends)
        model.config.get_text_config().eos_token_id = model.generation_config.eos_token_id
        model.config.eos_token_id = model.generation_config.eos_token_id

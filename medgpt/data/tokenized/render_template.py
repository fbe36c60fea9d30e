"""Renders messages with a chat template, as text and as token ids."""

import json
import re
from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from medgpt.data.sources.records import Message
from medgpt.data.tokenized.template_choice import thinking_switch
from medgpt.data.tokenized.template_messages import (
    DEFAULT_STYLE,
    CallStyle,
    as_dicts,
    find_call_style,
)

CharSpan = tuple[int, int]
"""[start, end) in characters."""
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")


def template_text(tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.get_chat_template()


def control_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return tokens that a message must not contain: special tokens and those of the template."""
    template = template_text(tokenizer)
    return [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or (token.content.strip() and token.content in template)
    ]


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the special tokens, without tags that only look like them."""
    tokens = tokenizer.added_tokens_decoder.values()
    return [t.content for t in tokens if t.special and not t.content.startswith("</tool")]


def render(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    tools: str | None = None,
    *,
    add_generation_prompt: bool = False,
    thinking: bool | None = None,
) -> str:
    """Return the text that the template renders."""
    return render_dicts(
        tokenizer,
        message_dicts(tokenizer, messages),
        None if tools is None else json.loads(tools),
        add_generation_prompt=add_generation_prompt,
        **thinking_option(tokenizer, thinking),
    )


def render_dicts(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    **options: Any,
) -> str:
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)  # pyright: ignore[reportArgumentType]
    assert isinstance(text, str)
    return text


def message_dicts(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]
) -> list[dict[str, Any]]:
    style = None
    if any(message.tool_calls for message in messages):
        style = call_style(tokenizer)
    return as_dicts(messages, template_text(tokenizer), style or DEFAULT_STYLE)


def call_style(tokenizer: PreTrainedTokenizerFast) -> CallStyle | None:
    """Return how the template takes calls of tools; None if it renders none."""
    special: dict[str, str] = tokenizer.special_tokens_map  # pyright: ignore[reportAssignmentType]
    tokens = tuple((name, token) for name, token in special.items() if isinstance(token, str))
    return find_call_style(template_text(tokenizer), tokens)


def thinking_option(tokenizer: PreTrainedTokenizerFast, thinking: bool | None) -> dict[str, bool]:
    switch = thinking_switch(template_text(tokenizer))
    return {} if thinking is None or switch is None else {switch: thinking}


def has_answer_tags(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the template marks the assistant's text with {% generation %}."""
    return _GENERATION_TAG.search(template_text(tokenizer)) is not None


def render_tagged(
    tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Sequence[Message]]
) -> list[tuple[str, list[CharSpan]]]:
    """Render each conversation and locate what the template marks with {% generation %}."""
    special: dict[str, Any] = tokenizer.special_tokens_map
    template = template_text(tokenizer)
    texts, spans = render_jinja_template(
        conversations=[as_dicts(messages, template) for messages in conversations],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **special,
    )
    return list(zip(texts, cast(list[list[CharSpan]], spans), strict=True))


def continuation_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the ids of a text that follows others, of which no token joins it."""
    end = str(tokenizer.eos_token)  # a text's first word may be encoded in another way
    return tokenizer(end + text, add_special_tokens=False)["input_ids"][1:]

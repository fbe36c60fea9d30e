"""Renders conversations with the chat template of a model, alike in training and generation."""

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path

from transformers import AddedToken, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from medgpt.data.sources.records import Message
from medgpt.data.tokenized.answer_format import (
    end_of_call_token,
    end_of_turn_token,
    find_answer_format,
)
from medgpt.data.tokenized.render_template import (
    continuation_ids,
    control_tokens,
    message_dicts,
    render_dicts,
    thinking_option,
)
from medgpt.data.tokenized.thoughts import THINK_END, THINK_START, opens_thought

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
CHATML = Path(__file__).with_name("chatml.jinja").read_text("utf-8")
"""Default template. {% generation %} encloses the assistant's text and its end token."""

PROBE_MESSAGES = (
    Message("user", "我头痛3天了。"),
    Message("assistant", "请测量体温。"),
    Message("user", "38.5 degrees, what now?"),
    Message("assistant", "See a doctor today."),
    Message("user", "谢谢"),
    Message("assistant", "(不客气)"),
)
"""A conversation to probe a template with."""


def prepare_chat_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return a copy with a chat template (default ChatML) whose eos token ends a turn.

    A base tokenizer without a template may gain the ChatML tokens; its model then needs rows for
    them, see models.vocabulary_change.replace_vocabulary.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHATML
        turn_tokens = [
            AddedToken(text, special=True, normalized=False) for text in (TURN_START, TURN_END)
        ]
        tokenizer.add_tokens(turn_tokens, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # the end of text, which ends no turn
    tokenizer.eos_token = end_of_turn_token(tokenizer)
    return tokenizer


def generation_prompt_ids(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    tools: str | None = None,
    *,
    thinking: bool | None = None,
) -> list[int]:
    """Return the token ids of the prompt for the assistant's next turn.

    Control tokens typed into a message are encoded as plain text; the thoughts of earlier answers
    are rendered as the template does it.

    Args:
        tools: JSON list of the tools that the model may call.
        thinking: whether the model shall think first; None is the template's default.
    """
    tokens = sorted(control_tokens(tokenizer), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, tokens)) or "(?!)")  # (?!) matches nothing
    inside_answers = re.compile(f"(?!{THINK_START}|{THINK_END})(?:{pattern.pattern})")
    marked = []
    for message in message_dicts(tokenizer, messages):
        typed = inside_answers if message["role"] == "assistant" else pattern
        role = message.pop("role")  # never marked: templates compare it
        marked.append({"role": role, **mark_control_tokens(message, typed)})
    text = render_dicts(
        tokenizer,
        marked,
        None if tools is None else mark_control_tokens(json.loads(tools), pattern),
        add_generation_prompt=True,
        **thinking_option(tokenizer, thinking),
    )
    ids = encode_marked_chat(tokenizer, text)
    if thinking is False and opens_thought(text):  # the template has no switch
        ids += continuation_ids(tokenizer, find_answer_format(tokenizer).before)
    return ids


def stop_token_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids that end a generated answer: ends of a turn, of a call, and of the text."""
    ends = {
        end_of_turn_token(tokenizer),
        end_of_call_token(tokenizer),
        str(tokenizer.eos_token),
        str(tokenizer.pad_token),
        END_OF_TEXT,
    }
    vocabulary = tokenizer.get_added_vocab()
    return sorted(vocabulary[token] for token in ends if token in vocabulary)

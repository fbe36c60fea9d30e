"""Renders conversations with the chat template of a model, alike in training and generation."""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError
from transformers import AddedToken, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from medgpt.config.base import ConfigError
from medgpt.data.sources.records import Message

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
CHATML = Path(__file__).with_name("chatml.jinja").read_text("utf-8")
"""Default template. {% generation %} encloses the assistant's text and its end token."""

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE_MESSAGES = (
    Message("user", "我头痛3天了。"),
    Message("assistant", "请测量体温。"),
    Message("user", "38.5 degrees, what now?"),
    Message("assistant", "See a doctor today."),
    Message("user", "谢谢"),
    Message("assistant", "(不客气)"),
)
"""A conversation to probe a template with."""

CharSpan = tuple[int, int]
"""[start, end) in characters."""


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
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]
) -> list[int]:
    """Return the token ids of the prompt for the assistant's next turn.

    Control tokens typed into a message are encoded as plain text.
    """
    ids = tokenizer.apply_chat_template(
        _as_dicts(messages),
        add_generation_prompt=True,
        return_dict=False,
        sanitize_control_tokens=True,
    )
    return cast(list[int], ids)


def stop_token_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids that end a generated answer: end of turn and end of text."""
    ends = {
        end_of_turn_token(tokenizer),
        str(tokenizer.eos_token),
        str(tokenizer.pad_token),
        END_OF_TEXT,
    }
    vocabulary = tokenizer.get_added_vocab()
    return sorted(vocabulary[token] for token in ends if token in vocabulary)


def control_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return tokens that a message must not contain: special tokens and those of the template."""
    template = _template_text(tokenizer)
    return [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or (token.content.strip() and token.content in template)
    ]


def end_of_turn_token(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the token that ends an assistant turn. Raises ConfigError if the template has none."""
    messages = PROBE_MESSAGES[:2]
    prompt = render(tokenizer, messages[:1], add_generation_prompt=True)
    text = render(tokenizer, messages)
    tail = text[text.rindex(messages[1].content) + len(messages[1].content) :]
    ends = [token for token in control_tokens(tokenizer) if token in tail]
    if not text.startswith(prompt) or not ends:
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path} does not continue its own prompt, or "
            "no special token ends the assistant's turn; give the tokenizer another chat_template"
        )
    return min(ends, key=tail.index)


def render(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
) -> str:
    """Return the text that the template renders."""
    text = tokenizer.apply_chat_template(
        _as_dicts(messages), add_generation_prompt=add_generation_prompt, tokenize=False
    )
    assert isinstance(text, str)
    return text


def render_with_answer_spans(
    tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Sequence[Message]], end_token: str
) -> list[tuple[str, list[CharSpan]]]:
    """Render each conversation and locate its assistant turns, including `end_token`.

    The spans are those of {% generation %} if the template has it. Otherwise, a turn starts where
    its prompt ends; a turn whose prompt is not a prefix of the rendered text gets no span.
    """
    if _GENERATION_TAG.search(_template_text(tokenizer)):
        rendered = _render_tagged(tokenizer, conversations)
    else:
        rendered = [_render_untagged(tokenizer, messages) for messages in conversations]
    return [(text, _extend_to_end_token(text, spans, end_token)) for text, spans in rendered]


def _extend_to_end_token(text: str, spans: Sequence[CharSpan], end_token: str) -> list[CharSpan]:
    ends = [(start, stop, text.find(end_token, start) + len(end_token)) for start, stop in spans]
    return [(start, max(stop, after)) for start, stop, after in ends if after > start]


def check_prompts_are_prefixes(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise ConfigError unless the prompt ids of each answer are a prefix of the conversation's."""
    ids = tokenizer(render(tokenizer, PROBE_MESSAGES), add_special_tokens=False)["input_ids"]
    for i in range(1, len(PROBE_MESSAGES), 2):
        prompt = generation_prompt_ids(tokenizer, PROBE_MESSAGES[:i])
        if ids[: len(prompt)] != prompt:
            raise ConfigError(
                f"the chat template of {tokenizer.name_or_path} rewrites earlier turns as the "
                "conversation continues (some remove the reasoning), so training would not see the "
                "text of generation; give the tokenizer a chat_template that keeps earlier turns"
            )


def accepts_system_message(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the template renders a system message; some raise an error."""
    try:
        render(tokenizer, (Message("system", "You are a doctor."), *PROBE_MESSAGES[:2]))
    except TemplateError:
        return False
    return True


def _render_tagged(
    tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Sequence[Message]]
) -> list[tuple[str, list[CharSpan]]]:
    special: dict[str, Any] = tokenizer.special_tokens_map
    texts, spans = render_jinja_template(
        conversations=[_as_dicts(messages) for messages in conversations],
        chat_template=_template_text(tokenizer),
        return_assistant_tokens_mask=True,
        **special,
    )
    return list(zip(texts, cast(list[list[CharSpan]], spans), strict=True))


def _render_untagged(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]
) -> tuple[str, list[CharSpan]]:
    text = render(tokenizer, messages)
    answers = (i for i, message in enumerate(messages) if message.role == "assistant")
    prompts = [render(tokenizer, messages[:i], add_generation_prompt=True) for i in answers]
    return text, [(len(prompt), len(prompt)) for prompt in prompts if text.startswith(prompt)]


def _template_text(tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.get_chat_template()


def _as_dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    # strip: a newline at the start of an answer would merge with the one before it into one token
    return [{"role": message.role, "content": message.content.strip()} for message in messages]

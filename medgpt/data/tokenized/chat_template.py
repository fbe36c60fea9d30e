"""Conversations as a model's chat template writes them, alike in training and generation."""

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
"""Default template. {% generation %} marks what the assistant writes, its end token included."""

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE_MESSAGES = (
    Message("user", "我头痛3天了。"),
    Message("assistant", "请测量体温。"),
    Message("user", "38.5 degrees, what now?"),
    Message("assistant", "See a doctor today."),
    Message("user", "谢谢"),
    Message("assistant", "(不客气)"),
)
"""A conversation that shows what a template does."""

CharSpan = tuple[int, int]
"""[start, end) in characters."""


def prepare_chat_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A copy that can chat: it has a template (default ChatML) and ends turns with its eos token.

    A base without a template may gain the ChatML tokens; its model then needs rows for them, see
    models.vocabulary.replace_vocabulary.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHATML
        turn_tokens = [
            AddedToken(text, special=True, normalized=False) for text in (TURN_START, TURN_END)
        ]
        tokenizer.add_tokens(turn_tokens, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # an end of text that no turn ends with
    tokenizer.eos_token = end_of_turn_token(tokenizer)
    return tokenizer


def generation_prompt_ids(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]
) -> list[int]:
    """Token ids to generate the assistant's next turn from.

    Control tokens that someone typed into a message are encoded as plain text.
    """
    ids = tokenizer.apply_chat_template(
        _as_dicts(messages),
        add_generation_prompt=True,
        return_dict=False,
        sanitize_control_tokens=True,
    )
    return cast(list[int], ids)


def stop_token_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids that end a generated answer: the end of the turn and the end of the text."""
    ends = {
        end_of_turn_token(tokenizer),
        str(tokenizer.eos_token),
        str(tokenizer.pad_token),
        END_OF_TEXT,
    }
    vocabulary = tokenizer.get_added_vocab()
    return sorted(vocabulary[token] for token in ends if token in vocabulary)


def control_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Tokens a message must not hold: the special ones and those the template writes."""
    template = _template_text(tokenizer)
    return [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or (token.content.strip() and token.content in template)
    ]


def end_of_turn_token(tokenizer: PreTrainedTokenizerFast) -> str:
    """The token that ends the assistant's turn. Raises ConfigError if the template writes none."""
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
    """The template's text."""
    text = tokenizer.apply_chat_template(
        _as_dicts(messages), add_generation_prompt=add_generation_prompt, tokenize=False
    )
    assert isinstance(text, str)
    return text


def render_with_answer_spans(
    tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Sequence[Message]], end_token: str
) -> list[tuple[str, list[CharSpan]]]:
    """Of each the template's text and where in it the assistant's turns are, each with its end
    token `end`.

    A template that marks its {% generation %} is believed; under any other, a turn starts where the
    prompt for it stops. A turn that the template writes otherwise in its prompt is left out.
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
    """Raise ConfigError unless the prompt for each answer is a prefix of a conversation's ids."""
    ids = tokenizer(render(tokenizer, PROBE_MESSAGES), add_special_tokens=False)["input_ids"]
    for i in range(1, len(PROBE_MESSAGES), 2):
        prompt = generation_prompt_ids(tokenizer, PROBE_MESSAGES[:i])
        if ids[: len(prompt)] != prompt:
            raise ConfigError(
                f"the chat template of {tokenizer.name_or_path} rewrites earlier turns as the "
                "conversation goes on (some remove the reasoning), so training would not see what "
                "generation sees; give the tokenizer a chat_template that leaves them as they were"
            )


def accepts_system_message(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Some templates refuse it."""
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
    # stripped: a newline at the start of an answer would join the one before it in a single token
    return [{"role": message.role, "content": message.content.strip()} for message in messages]

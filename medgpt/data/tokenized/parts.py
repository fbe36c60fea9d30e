"""Splits a conversation into parts that are rendered as generation sees them.

A template may rewrite earlier turns as a conversation goes on: Qwen3 removes thoughts, gpt-oss ends
the last turn with another token than those before. An answer whose prompt at generation does not
begin with the part before it begins a part of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import BatchEncoding, PreTrainedTokenizerFast

from medgpt.data.sources.records import Message
from medgpt.data.tokenized import chat_template
from medgpt.data.tokenized.answer_format import (
    AnswerFormat,
    call_after_prompt,
    find_answer_format,
)
from medgpt.data.tokenized.render_template import (
    CharSpan,
    continuation_ids,
    has_answer_tags,
    render,
    render_tagged,
)
from medgpt.data.tokenized.template_messages import PROBE_CALL, PROBE_TOOLS
from medgpt.data.tokenized.thoughts import split_thought

TokenSpan = tuple[int, int]
"""[start, end) in tokens."""


class TokenizedPart(NamedTuple):
    """A part of a conversation, and its answers that are learned."""

    ids: NDArray[np.int32]  # (N,)
    turns: list[TokenSpan]  # (A,) each with its end token
    answers: list[int]  # (A,) numbers of their messages


@dataclass
class RenderedPart:
    """The same as text."""

    text: str
    spans: list[CharSpan]
    answers: list[int]


class Chat(NamedTuple):
    """A conversation to be rendered."""

    messages: tuple[Message, ...]
    answers: list[int]  # numbers of the messages that are learned
    tools: str | None = None  # JSON list of the tools that the assistant may call

    @property
    def uses_tools(self) -> bool:
        return self.tools is not None or any(message.tool_calls for message in self.messages)


class AnswerWriter:
    """Writes answers as the template of a tokenizer does it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Raises ConfigError if the template does not continue its own prompts."""
        self.tokenizer = tokenizer
        self.format = find_answer_format(tokenizer)

    @cached_property
    def format_after_tool(self) -> AnswerFormat:
        return find_answer_format(self.tokenizer, PROBE_CALL, PROBE_TOOLS)

    def write(self, chat: Chat, number: int, prompt: str) -> str:
        """Return what the model has to write after `prompt`: the message and its end.

        Raises ValueError if the template cannot continue the prompt with it.
        """
        message, before = chat.messages[number], chat.messages[number - 1]
        answer_format = self.format_after_tool if before.role == "tool" else self.format
        if message.tool_calls is None:
            return answer_format.write(message.content)
        messages = chat.messages[: number + 1]
        call = call_after_prompt(self.tokenizer, messages, chat.tools, prompt, answer_format)
        if call is None or split_thought(message.content).thought not in call:
            raise ValueError("the chat template does not continue its prompt with a call")
        return call


def render_parts(writer: AnswerWriter, chat: Chat) -> list[RenderedPart]:
    """Render the conversation up to each learned answer, in as few parts as possible."""
    tokenizer, messages = writer.tokenizer, chat.messages
    parts: list[RenderedPart] = []
    for i in chat.answers:
        prompt = render(tokenizer, messages[:i], chat.tools, add_generation_prompt=True)
        text = prompt + writer.write(chat, i, prompt)
        if not parts or not prompt.startswith(parts[-1].text):
            parts.append(RenderedPart("", [], []))
        parts[-1].text = text
        parts[-1].spans.append((len(prompt), len(text)))
        parts[-1].answers.append(i)
    for part in parts:  # what the template writes after the end, mostly a line end
        rendered = render(tokenizer, messages[: part.answers[-1] + 1], chat.tools)
        part.text = rendered if rendered.startswith(part.text) else part.text
    return parts


def tokenize_parts(
    tokenizer: PreTrainedTokenizerFast, conversations: Sequence[Sequence[RenderedPart]]
) -> list[list[TokenizedPart]]:
    """Encode the parts of each conversation. The ids before every answer are those of its prompt.

    A part in which a token joins a prompt and its answer is split into one part for each answer.
    """
    parts = [part for rendered in conversations for part in rendered]
    if not parts:
        return []
    prompts = [part.text[:start] for part in parts for start, _ in part.spans]
    batch = tokenizer(
        [*(part.text for part in parts), *prompts],
        add_special_tokens=False,
        return_attention_mask=False,
        verbose=False,
    )
    ids, prompt_ids = batch["input_ids"], iter(batch["input_ids"][len(parts) :])
    tokenized: list[list[TokenizedPart]] = []
    rows = iter(range(len(parts)))
    for rendered in conversations:
        tokenized.append([])
        for part in rendered:
            row, before = next(rows), [next(prompt_ids) for _ in part.spans]
            stops = [batch.char_to_token(row, stop - 1) for _, stop in part.spans]
            if any(ids[row][: len(b)] != b for b in before) or None in stops:
                tokenized[-1] += _one_by_one(tokenizer, part, before)
                continue
            turns = [(len(b), stop + 1) for b, stop in zip(before, stops, strict=True)]
            tokenized[-1].append(TokenizedPart(np.array(ids[row], np.int32), turns, part.answers))
    return tokenized


def _one_by_one(
    tokenizer: PreTrainedTokenizerFast, part: RenderedPart, prompts: list[list[int]]
) -> list[TokenizedPart]:
    parts = []
    for (start, stop), prompt, answer in zip(part.spans, prompts, part.answers, strict=True):
        ids = [*prompt, *continuation_ids(tokenizer, part.text[start:stop])]
        turns = [(len(prompt), len(ids))]
        parts.append(TokenizedPart(np.array(ids, np.int32), turns, [answer]))
    return parts


def tags_are_exact(writer: AnswerWriter) -> bool:
    """Whether what the template marks with {% generation %} begins where prompts end.

    Then a conversation is one part, and its prompts need not be rendered: see `tokenize_tagged`.
    """
    if not has_answer_tags(writer.tokenizer):
        return False
    messages = chat_template.PROBE_MESSAGES
    rendered = render_parts(writer, Chat(messages, list(range(1, len(messages), 2))))
    text, spans = render_tagged(writer.tokenizer, [messages])[0]
    starts = [start for start, _ in spans]
    same_starts = starts == [start for start, _ in rendered[0].spans]
    return len(rendered) == 1 and rendered[0].text == text and same_starts


def tokenize_tagged(writer: AnswerWriter, chats: Sequence[Chat]) -> list[list[TokenizedPart]]:
    """Do the same as render_parts and tokenize_parts for a template whose tags are exact.

    A conversation whose answers are not rendered as they stand takes the way of the others. None of
    them has tools.
    """
    if not chats:
        return []
    rendered = render_tagged(writer.tokenizer, [chat.messages for chat in chats])
    batch = writer.tokenizer(
        [text for text, _ in rendered],
        add_special_tokens=False,
        return_attention_mask=False,
        verbose=False,
    )
    results = []
    for row, (chat, (text, spans)) in enumerate(zip(chats, rendered, strict=True)):
        numbers = [i for i, message in enumerate(chat.messages) if message.role == "assistant"]
        starts = dict(zip(numbers, (start for start, _ in spans), strict=False))
        turns = []
        for i in chat.answers:
            written = writer.format.write(chat.messages[i].content)
            start = starts.get(i, len(text))
            turn = _token_span(batch, row, (start, start + len(written)))
            if turn is not None and text.startswith(written, start):
                turns.append(turn)
        if len(turns) == len(chat.answers) and len(spans) == len(numbers):
            ids = np.array(batch["input_ids"][row], np.int32)
            results.append([TokenizedPart(ids, turns, chat.answers)])
        else:
            results += tokenize_parts(writer.tokenizer, [render_parts(writer, chat)])
    return results


def _token_span(batch: BatchEncoding, row: int, span: CharSpan) -> TokenSpan | None:
    """Return the token span of a character span, or None if its first token starts before it."""
    first, last = (batch.char_to_token(row, char) for char in (span[0], span[1] - 1))
    if first is None or last is None:
        return None
    first_chars = batch.token_to_chars(row, first)
    return (first, last + 1) if first_chars is not None and first_chars.start == span[0] else None

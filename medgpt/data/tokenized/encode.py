"""Encodes records as token ids, and marks which tokens are targets of the loss."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from medgpt.config.base import ConfigError
from medgpt.data.sources.records import Conversation, Document, Message, Preferences, Record, Reject
from medgpt.data.tokenized import chat_template, parts
from medgpt.data.tokenized.answer_format import accepts_system_message, accepts_tools
from medgpt.data.tokenized.conversation import (
    Changes,
    ChatOptions,
    conversation_error,
    drop_exchanges,
)
from medgpt.data.tokenized.long_text import WINDOW, Tokens, tokenize_in_windows
from medgpt.data.tokenized.parts import (
    AnswerWriter,
    Chat,
    RenderedPart,
    TokenizedPart,
    TokenSpan,
)
from medgpt.data.tokenized.render_template import call_style
from medgpt.data.tokenized.thoughts import THINK_END, THINK_START, split_thought, thought_error
from medgpt.data.tokenized.words import char_word_ids

NOTHING_TO_LEARN = "no turn of the assistant is to be learned"
NOT_RENDERED = "the chat template cannot render this conversation"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedSample:
    """The N tokens of one record."""

    input_ids: NDArray[np.int32]  # (N,)
    targets: NDArray[np.bool_]  # (N,) True where the loss counts
    word_ids: NDArray[np.int32] | None = None  # (N,) number of the word, -1 = none
    num_truncated_turns: int = 0  # messages removed to fit max_length
    changes: Changes = field(default_factory=dict)  # of the record
    turn: int = 0  # number of the last message
    further: tuple["EncodedSample", ...] = ()  # of the same record, each rendered by itself
    sequence_lengths: NDArray[np.int32] | None = None  # (K,) tokens of each answer with its prompt
    grades: NDArray[np.float32] | None = None  # (K,) grade of each answer
    messages: str | None = None  # JSON, of prompts only: see records.prompt_to_json


class DocumentEncoder:
    """Encodes texts for pretraining. A conversation becomes its messages, one per line.

    clm: text and end token, all targets. mlm: [CLS] text [SEP], the text is the target. Special
    tokens spelled out in a text are encoded as ordinary text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        objective: Literal["clm", "mlm"],
        whole_word: bool = True,
    ):
        self._tokenizer = tokenizer
        self._mlm = objective == "mlm"
        self._whole_word = self._mlm and whole_word
        if self._mlm and tokenizer.mask_token is None:
            raise ConfigError(
                "objective.kind=mlm: the tokenizer has no mask token; use a BERT model or clm"
            )
        if not self._mlm and tokenizer.eos_token is None:
            raise ConfigError(
                "objective.kind=clm: the tokenizer has no end token; set its eos_token or use mlm"
            )
        end = tokenizer.sep_token if self._mlm else tokenizer.eos_token
        self._end_id = tokenizer.get_vocab()[str(end)]
        self._special = np.array(tokenizer.all_special_ids, dtype=np.int32)

    def __call__(self, record: Record) -> EncodedSample | Reject:
        return self.encode_batch([record])[0]

    def encode_batch(self, records: Sequence[Record]) -> list[EncodedSample | Reject]:
        reasons = [_document_error(record) for record in records]
        texts = [_record_text(record) for record in records]
        if not texts:
            return []
        return [
            self._encode(tokens, text)
            if reason is None and len(tokens.ids)
            else Reject.of(record, reason or "empty text")
            for record, text, reason, tokens in zip(
                records, texts, reasons, self._tokenize(texts), strict=True
            )
        ]

    def _tokenize(self, texts: list[str]) -> list[Tokens]:
        """Return the tokens of each text with its special tokens, which start at character 0."""
        short = [text for text in texts if len(text) <= WINDOW]
        batch = self._tokenizer(
            short or [""],
            split_special_tokens=True,
            return_offsets_mapping=self._whole_word,
            return_attention_mask=False,
            verbose=False,
        )
        offsets = batch["offset_mapping"] if self._whole_word else [[]] * len(short)
        tokens_of_short = (
            Tokens(np.array(ids, np.int32), np.array(pairs, np.int32).reshape(-1, 2)[:, 0])
            for ids, pairs in zip(batch["input_ids"], offsets, strict=False)
        )
        return [
            next(tokens_of_short) if len(text) <= WINDOW else self._tokenize_long(text)
            for text in texts
        ]

    def _tokenize_long(self, text: str) -> Tokens:
        tokens = tokenize_in_windows(self._tokenizer, text)
        with_special, plain = (
            self._tokenizer("a", add_special_tokens=special)["input_ids"]
            for special in (True, False)
        )
        place = next(
            k for k in range(len(with_special)) if with_special[k : k + len(plain)] == plain
        )
        before, after = with_special[:place], with_special[place + len(plain) :]
        ids = np.concatenate([before, tokens.ids, after]).astype(np.int32)
        return Tokens(ids, np.pad(tokens.starts, (len(before), len(after))))

    def _encode(self, tokens: Tokens, text: str) -> EncodedSample:
        ids = tokens.ids
        if not self._mlm:
            if ids[-1] != self._end_id:
                ids = np.append(ids, np.int32(self._end_id))
            return EncodedSample(input_ids=ids, targets=np.ones(len(ids), dtype=np.bool_))
        targets = ~np.isin(ids, self._special)
        word_ids = None
        if self._whole_word:
            word_ids = np.where(targets, char_word_ids(text)[tokens.starts], np.int32(-1))
        return EncodedSample(input_ids=ids, targets=targets, word_ids=word_ids)


DEFAULT_OPTIONS = ChatOptions()


class ChatEncoder:
    """Base class: checks that the chat template can render a record, and tokenizes its text.

    A subclass overrides `__call__` or `encode_batch`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        max_length: int,
        options: ChatOptions = DEFAULT_OPTIONS,
    ) -> None:
        """Raises ConfigError if the template does not continue its own prompts."""
        self._tokenizer, self._max_length, self._options = tokenizer, max_length, options
        self._writer = AnswerWriter(tokenizer)
        self._control_tokens = chat_template.control_tokens(tokenizer)
        self._accepts_system_message = accepts_system_message(tokenizer)
        self._tags_are_exact = parts.tags_are_exact(self._writer)

    @cached_property
    def _accepts_tools(self) -> bool:
        return accepts_tools(self._tokenizer)

    @cached_property
    def _accepts_calls(self) -> bool:
        return call_style(self._tokenizer) is not None

    def __call__(self, record: Record) -> EncodedSample | Reject:
        return self.encode_batch([record])[0]

    def encode_batch(self, records: Sequence[Record]) -> list[EncodedSample | Reject]:
        return [self(record) for record in records]

    def reject_reason(self, messages: Sequence[Message], tools: str | None) -> str | None:
        """Return why messages that end with the assistant cannot be encoded, or None."""
        if (reason := conversation_error(messages)) is not None:
            return reason
        if messages[0].role == "system" and not self._accepts_system_message:
            return "the chat template takes no system message; set data.system to fold or drop"
        if tools is not None and not self._accepts_tools:
            return "the chat template renders no tools"
        if any(message.tool_calls for message in messages) and not self._accepts_calls:
            return "the chat template renders no calls of tools"
        for message in messages:
            if (reason := self._content_error(message)) is not None:
                return reason
        return None

    def _content_error(self, message: Message) -> str | None:
        text = message.text
        if message.role == "assistant":
            if (reason := thought_error(message.content, message.tool_calls)) is not None:
                return reason
            has_thought = split_thought(message.content).thought != ""
            if has_thought and not self._writer.format.takes_thoughts:
                return (
                    "an answer has a thought, but prompts end with an empty one; set "
                    "tokenizer.thinking to on, or data.thinking to strip"
                )
            text = text.replace(THINK_START, "").replace(THINK_END, "")
        for token in self._control_tokens:
            if token in text:
                return f"a message contains the control token {token}"
        return None

    def tokenize(self, chats: Sequence[Chat]) -> list[list[TokenizedPart] | None]:
        """Return the parts of each conversation; None where the template cannot render it."""
        if self._tags_are_exact and not any(chat.uses_tools for chat in chats):
            return [*parts.tokenize_tagged(self._writer, chats)]
        rendered = [self._render(chat) for chat in chats]
        tokenized = iter(
            parts.tokenize_parts(self._tokenizer, [r for r in rendered if r is not None])
        )
        return [None if r is None else next(tokenized) for r in rendered]

    def _render(self, chat: Chat) -> list[RenderedPart] | None:
        try:
            return parts.render_parts(self._writer, chat)
        except (TemplateError, TypeError, ValueError):  # TypeError: text + None in a template
            return None


class ConversationEncoder(ChatEncoder):
    """Encodes conversations for fine-tuning.

    Targets are the assistant's turns with their end tokens. A part that is longer than `max_length`
    tokens loses its oldest exchanges, never its system message.
    """

    def encode_batch(self, records: Sequence[Record]) -> list[EncodedSample | Reject]:
        results: dict[int, EncodedSample | Reject] = {}
        pending: dict[int, tuple[Chat, Changes]] = {}
        for i, record in enumerate(records):
            if not isinstance(record, Conversation):
                kind = type(record).__name__.lower()
                results[i] = Reject.of(record, f"{kind} where a conversation is needed")
                continue
            messages, changes = self._options.apply(record.messages)
            answers = self._options.learned_answers(messages)
            if (reason := self.reject_reason(messages, record.tools)) is not None:
                results[i] = Reject.of(record, reason)
            elif not answers:
                results[i] = Reject.of(record, NOTHING_TO_LEARN, malformed=False)
            else:
                pending[i] = Chat(messages, answers, record.tools), changes
        tokenized = self.tokenize([chat for chat, _ in pending.values()])
        for (i, (chat, changes)), found in zip(pending.items(), tokenized, strict=True):
            results[i] = self._encode(records[i], chat, changes, found)
        return [results[i] for i in range(len(records))]

    def _encode(
        self, record: Record, chat: Chat, changes: Changes, found: list[TokenizedPart] | None
    ) -> EncodedSample | Reject:
        """Return the samples of all parts that fit, the first with the others."""
        if found is None:
            return Reject.of(record, NOT_RENDERED)
        results = [self._fit(chat, part) for part in found]
        samples = [result for result in results if isinstance(result, EncodedSample)]
        if not samples:
            reason = f"last exchange of {results[-1]} tokens > max_length {self._max_length}"
            return Reject.of(record, reason, malformed=False)
        if len(samples) < len(results):
            too_long = "answers left out, too long with their question"
            changes = changes | {too_long: len(results) - len(samples)}
        return replace(samples[0], further=tuple(samples[1:]), changes=changes)

    def _fit(self, chat: Chat, part: TokenizedPart) -> EncodedSample | int:
        """Encode a part without as many of its oldest exchanges as it takes to fit.

        Returns the number of its tokens if its last exchange alone is too long.
        """
        messages = chat.messages[: part.answers[-1] + 1]
        shortened = {0: part}

        def num_tokens_without(num_exchanges: int) -> int:
            if num_exchanges not in shortened:
                shorter = drop_exchanges(messages, num_exchanges)
                num_removed = len(messages) - len(shorter)
                first = num_removed + int(messages[0].role == "system")
                answers = [i - num_removed for i in part.answers if i > first]
                found = self.tokenize([Chat(shorter, answers, chat.tools)])[0]
                assert found is not None, "the whole conversation was rendered"
                shortened[num_exchanges] = found[-1]
            return len(shortened[num_exchanges].ids)

        choices = range(sum(message.role == "user" for message in messages))
        removed = 0
        if len(part.ids) > self._max_length:
            removed = bisect_left(choices, -self._max_length, key=lambda n: -num_tokens_without(n))
        if removed == len(choices):
            return num_tokens_without(removed - 1)
        fitting = shortened[removed]
        return EncodedSample(
            input_ids=fitting.ids,
            targets=target_mask(len(fitting.ids), fitting.turns),
            num_truncated_turns=len(messages) - len(drop_exchanges(messages, removed)),
            turn=part.answers[-1],
        )


def target_mask(length: int, turns: Sequence[TokenSpan]) -> NDArray[np.bool_]:
    """Return (length,) True inside the turns."""
    mask = np.zeros(length, dtype=np.bool_)
    for start, stop in turns:
        mask[start:stop] = True
    return mask


def _document_error(record: Record) -> str | None:
    """Return why a record cannot be learned as one text, or None."""
    if not _record_text(record).strip():
        return "empty text"
    if isinstance(record, Document):
        return None
    if isinstance(record, Preferences) and len(record.answers) == 1 and record.grades[0] < 0:
        return "an answer labeled bad where a document is needed"
    if not all(message.learn for message in record.messages):
        return "a turn is not to be learned, but pretraining learns whole texts"
    if record.tools is not None:
        return "a conversation with tools where a document is needed"
    return None


def _record_text(record: Record) -> str:
    if isinstance(record, Document):
        return record.text
    return "\n".join(message.text.strip() for message in record.messages)

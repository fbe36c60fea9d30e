"""Encodes records as token ids, and marks which tokens are targets of the loss."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from transformers import BatchEncoding, PreTrainedTokenizerFast

from medgpt.config.base import ConfigError
from medgpt.data.sources.records import Conversation, Document, Message, Record, Reject
from medgpt.data.sources.turns import may_follow
from medgpt.data.tokenized import chat_template
from medgpt.data.tokenized.words import char_word_ids

NOT_KEPT = "the chat template does not keep an answer from its prompt"
NOTHING_TO_LEARN = "no turn of the assistant is to be learned"

TokenSpan = tuple[int, int]
"""[start, end) in tokens."""
Tokenized = tuple[NDArray[np.int32], list[TokenSpan]]
"""(N,) ids of a conversation, and its assistant turns."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedSample:
    """The N tokens of one record."""

    input_ids: NDArray[np.int32]  # (N,)
    targets: NDArray[np.bool_]  # (N,) True where the loss counts
    word_ids: NDArray[np.int32] | None = None  # (N,) number of the word, -1 = none
    num_truncated_turns: int = 0  # messages removed to fit max_length
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
        batch = self._tokenizer(
            texts,
            split_special_tokens=True,
            return_offsets_mapping=self._whole_word,
            return_attention_mask=False,
            verbose=False,
        )
        return [
            self._encode(batch, row, text)
            if reason is None and batch["input_ids"][row]
            else Reject.of(record, reason or "empty text")
            for row, (record, text, reason) in enumerate(zip(records, texts, reasons, strict=True))
        ]

    def _encode(self, batch: BatchEncoding, row: int, text: str) -> EncodedSample:
        ids = np.array(batch["input_ids"][row], dtype=np.int32)
        if not self._mlm:
            if ids[-1] != self._end_id:
                ids = np.append(ids, np.int32(self._end_id))
            return EncodedSample(input_ids=ids, targets=np.ones(len(ids), dtype=np.bool_))
        targets = ~np.isin(ids, self._special)
        word_ids = None
        if self._whole_word:
            starts = np.array(batch["offset_mapping"][row], dtype=np.int32)[:, 0]
            word_ids = np.where(targets, char_word_ids(text)[starts], np.int32(-1))
        return EncodedSample(input_ids=ids, targets=targets, word_ids=word_ids)


class ChatEncoder:
    """Base class: checks that the chat template can render a record, and tokenizes its text.

    A subclass overrides `__call__` or `encode_batch`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
        """Raises ConfigError if generation would see other prompts than training."""
        chat_template.check_prompts_are_prefixes(tokenizer)
        self._tokenizer, self._max_length = tokenizer, max_length
        self._end = chat_template.end_of_turn_token(tokenizer)
        self._control_tokens = chat_template.control_tokens(tokenizer)
        self._accepts_system_message = chat_template.accepts_system_message(tokenizer)

    def __call__(self, record: Record) -> EncodedSample | Reject:
        return self.encode_batch([record])[0]

    def encode_batch(self, records: Sequence[Record]) -> list[EncodedSample | Reject]:
        return [self(record) for record in records]

    def reject_reason(self, messages: Sequence[Message]) -> str | None:
        """Return why messages that end with the assistant cannot be encoded, or None."""
        if (reason := conversation_error(messages)) is not None:
            return reason
        if messages[0].role == "system" and not self._accepts_system_message:
            return "the chat template takes no system message"
        for token in self._control_tokens:
            if any(token in message.text for message in messages):
                return f"a message contains the control token {token}"
        return None

    def tokenize(self, conversations: Sequence[Sequence[Message]]) -> list[Tokenized | None]:
        """Return ids and assistant turns of each conversation, or None for a conversation whose
        answers the template does not render as continuations of their prompts."""
        rendered = chat_template.render_with_answer_spans(self._tokenizer, conversations, self._end)
        batch = self._tokenizer(
            [text for text, _ in rendered],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )
        results = []
        for row, (messages, (_, spans)) in enumerate(zip(conversations, rendered, strict=True)):
            turns = [turn for span in spans if (turn := _token_span(batch, row, span)) is not None]
            complete = len(turns) == sum(message.role == "assistant" for message in messages)
            ids = np.array(batch["input_ids"][row], dtype=np.int32)
            results.append((ids, turns) if complete else None)
        return results


class ConversationEncoder(ChatEncoder):
    """Encodes conversations for fine-tuning.

    Targets are the assistant's turns with their end tokens. A conversation longer than `max_length`
    tokens loses its oldest exchanges, never its system message.
    """

    def encode_batch(self, records: Sequence[Record]) -> list[EncodedSample | Reject]:
        results: dict[int, EncodedSample | Reject] = {}
        pending: dict[int, Conversation] = {}
        for i, record in enumerate(records):
            if not isinstance(record, Conversation):
                kind = type(record).__name__.lower()
                results[i] = Reject.of(record, f"{kind} where a conversation is needed")
            elif (reason := self.reject_reason(record.messages)) is not None:
                results[i] = Reject.of(record, reason)
            else:
                pending[i] = record
        num_messages = {i: len(conversation.messages) for i, conversation in pending.items()}
        while pending:  # encode again those that lost an exchange
            tokenized = self.tokenize([conversation.messages for conversation in pending.values()])
            shorter = {}
            for (i, conversation), tokens in zip(pending.items(), tokenized, strict=True):
                result = self._encode(conversation, tokens)
                if isinstance(result, Conversation):
                    shorter[i] = result
                elif isinstance(result, EncodedSample):
                    num_truncated = num_messages[i] - len(conversation.messages)
                    results[i] = replace(result, num_truncated_turns=num_truncated)
                else:
                    results[i] = result
            pending = shorter
        return [results[i] for i in range(len(records))]

    def _encode(
        self, conversation: Conversation, tokens: Tokenized | None
    ) -> EncodedSample | Reject | Conversation:
        """Encode a conversation, or return it without its oldest exchanges if it is too long."""
        if tokens is None:
            return Reject.of(conversation, NOT_KEPT)
        ids, turns = tokens
        excess = len(ids) - self._max_length
        if excess > 0:
            num_questions = sum(message.role == "user" for message in conversation.messages)
            if num_questions == 1:
                reason = f"last exchange of {len(ids)} tokens > max_length {self._max_length}"
                return Reject.of(conversation, reason, malformed=False)
            # lower bound: removing an exchange frees at most the tokens up to its end
            enough = (k for k, (_, stop) in enumerate(turns[:-1], 1) if stop + 1 >= excess)
            num = next(enough, len(turns) - 1) if len(turns) == num_questions else 1  # else: tools
            return replace(conversation, messages=drop_exchanges(conversation.messages, num))
        answers = [message for message in conversation.messages if message.role == "assistant"]
        learnt = [turn for turn, answer in zip(turns, answers, strict=True) if answer.learn]
        if not learnt:
            return Reject.of(conversation, NOTHING_TO_LEARN, malformed=False)
        return EncodedSample(input_ids=ids, targets=target_mask(len(ids), learnt))


def conversation_error(messages: Sequence[Message]) -> str | None:
    """Return why a conversation cannot be trained on (empty or misordered turns), or None."""
    if any(not message.text.strip() and message.role != "tool" for message in messages):
        return "empty turn"
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if turns and turns[0].role != "user":
        return f"begins with the {turns[0].role}"
    if not all(may_follow(turn, next_turn) for turn, next_turn in pairwise(turns)):
        return "user and assistant do not alternate"
    if not turns or turns[-1].role != "assistant":
        return "does not end with the assistant"
    return None


def target_mask(length: int, turns: Sequence[TokenSpan]) -> NDArray[np.bool_]:
    """Return (length,) True inside the turns."""
    mask = np.zeros(length, dtype=np.bool_)
    for start, stop in turns:
        mask[start:stop] = True
    return mask


def drop_exchanges(messages: tuple[Message, ...], num: int) -> tuple[Message, ...]:
    """Remove the oldest `num` questions with all that follows each, but not the system message."""
    num_system = int(messages[0].role == "system")
    questions = [i for i, message in enumerate(messages) if message.role == "user"]
    return messages[:num_system] + messages[questions[num] :]


def _token_span(batch: BatchEncoding, row: int, span: chat_template.CharSpan) -> TokenSpan | None:
    """Return the token span of a character span, or None if its first token starts before it."""
    first, last = (batch.char_to_token(row, char) for char in (span[0], span[1] - 1))
    if first is None or last is None:
        return None
    first_chars = batch.token_to_chars(row, first)
    return (first, last + 1) if first_chars is not None and first_chars.start == span[0] else None


def _document_error(record: Record) -> str | None:
    """Return why a record cannot be learned as one text, or None."""
    if not _record_text(record).strip():
        return "empty text"
    if isinstance(record, Document):
        return None
    if not all(message.learn for message in record.messages):
        return "a turn is not to be learned, but pretraining learns whole texts"
    if record.tools is not None:
        return "a conversation with tools where a document is needed"
    return None


def _record_text(record: Record) -> str:
    if isinstance(record, Document):
        return record.text
    return "\n".join(message.text.strip() for message in record.messages)

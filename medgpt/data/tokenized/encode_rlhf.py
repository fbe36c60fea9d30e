"""Encodes preferences and prompts as token ids for reward models, DPO and PPO."""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from medgpt.data.sources.records import Conversation, Document, Message, Preferences, Record, Reject
from medgpt.data.tokenized import chat_template
from medgpt.data.tokenized.encode import EncodedSample, conversation_error, make_reject, token_span


class _TemplateChecks:
    """Checks whether a chat template can render messages."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        chat_template.check_prompts_are_prefixes(tokenizer)
        self._control_tokens = chat_template.control_tokens(tokenizer)
        self._accepts_system_message = chat_template.accepts_system_message(tokenizer)

    def reject_reason(self, messages: Sequence[Message]) -> str | None:
        """Return why a conversation that ends with the assistant cannot be encoded, or None."""
        if (reason := conversation_error(messages)) is not None:
            return reason
        if messages[0].role == "system" and not self._accepts_system_message:
            return "the chat template takes no system message"
        for token in self._control_tokens:
            if any(token in message.content for message in messages):
                return f"a message contains the control token {token}"
        return None


class PreferenceEncoder:
    """Encodes the prompt with each answer as one sequence, and concatenates the sequences.

    A sequence ends with the end token of its last turn, where generation stops. Targets are the
    assistant's turns after the prompt. A prompt loses its oldest exchanges, never its system
    message, until the longest sequence has at most `max_length` tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
        self._checks = _TemplateChecks(tokenizer)
        self._tokenizer, self._max_length = tokenizer, max_length
        self._end = chat_template.end_of_turn_token(tokenizer)

    def __call__(self, record: Record) -> EncodedSample | Reject:
        if not isinstance(record, Preferences):
            return make_reject(
                record, f"{type(record).__name__.lower()} where preferences are needed"
            )
        for answer in record.answers:
            if (reason := self._checks.reject_reason((*record.prompt, *answer))) is not None:
                return make_reject(record, reason)
        return self._encode(record, 0)

    def encode_batch(self, records: Sequence[Record]) -> list[EncodedSample | Reject]:
        return [self(record) for record in records]

    def _encode(self, record: Preferences, num_truncated: int) -> EncodedSample | Reject:
        encoded = [self._encode_sequence(record.prompt, answer) for answer in record.answers]
        sequences = [part for part in encoded if part is not None]
        if len(sequences) < len(encoded):
            return make_reject(record, "the chat template does not keep an answer from its prompt")
        longest = max(len(ids) for ids, _ in sequences)
        if longest > self._max_length:
            shorter = _drop_oldest_exchange(record.prompt)
            if shorter is None:
                reason = f"an answer with its question has {longest} tokens > {self._max_length}"
                return make_reject(record, reason, malformed=False)
            return self._encode(replace(record, prompt=shorter), num_truncated + 2)
        return EncodedSample(
            input_ids=np.concatenate([ids for ids, _ in sequences]),
            targets=np.concatenate([targets for _, targets in sequences]),
            sequence_lengths=np.array([len(ids) for ids, _ in sequences], np.int32),
            grades=np.array(record.grades, np.float32),
            num_truncated_turns=num_truncated,
        )

    def _encode_sequence(
        self, prompt: Sequence[Message], answer: Sequence[Message]
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]] | None:
        """Return (N,) ids and targets of one answer, or None if a token spans a turn's start."""
        messages = (*prompt, *answer)
        ((text, spans),) = chat_template.render_with_answer_spans(
            self._tokenizer, [messages], self._end
        )
        batch = self._tokenizer(
            [text], add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        turns = [tokens for span in spans if (tokens := token_span(batch, 0, span)) is not None]
        if len(turns) < sum(message.role == "assistant" for message in messages):
            return None
        ids = np.array(batch["input_ids"][0][: turns[-1][1]], np.int32)
        targets = np.zeros(len(ids), np.bool_)
        for start, stop in turns[-sum(message.role == "assistant" for message in answer) :]:
            targets[start:stop] = True
        return ids, targets


class PromptEncoder:
    """Encodes prompts for PPO: the whole history, up to where the answer starts.

    A conversation is cut before its last answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
        self._checks = _TemplateChecks(tokenizer)
        self._tokenizer, self._max_length = tokenizer, max_length

    def __call__(self, record: Record) -> EncodedSample | Reject:
        if isinstance(record, Document):
            return make_reject(record, "document where a prompt is needed")
        messages = record.prompt if isinstance(record, Preferences) else _prompt_messages(record)
        if (
            reason := self._checks.reject_reason((*messages, Message("assistant", "-")))
        ) is not None:
            return make_reject(record, reason)
        ids = np.array(chat_template.generation_prompt_ids(self._tokenizer, messages), np.int32)
        if len(ids) > self._max_length:
            reason = f"prompt of {len(ids)} tokens > max_length {self._max_length}"
            return make_reject(record, reason, malformed=False)
        turns = [[message.role, message.content] for message in messages]
        return EncodedSample(
            input_ids=ids,
            targets=np.zeros(len(ids), np.bool_),
            messages=json.dumps(turns, ensure_ascii=False),
        )

    def encode_batch(self, records: Sequence[Record]) -> list[EncodedSample | Reject]:
        return [self(record) for record in records]


def _prompt_messages(conversation: Conversation) -> tuple[Message, ...]:
    """Return the messages without the last answer, if there is one."""
    messages = conversation.messages
    return messages[:-1] if messages[-1].role == "assistant" else messages


def _drop_oldest_exchange(prompt: tuple[Message, ...]) -> tuple[Message, ...] | None:
    """Remove the oldest exchange, or return None if there is only one question."""
    num_system = int(prompt[0].role == "system")
    if len(prompt) - num_system < 3:
        return None
    return prompt[:num_system] + prompt[num_system + 2 :]

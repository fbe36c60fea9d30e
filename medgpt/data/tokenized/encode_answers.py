"""Preferences and prompts become token ids: what reward models, DPO and PPO read."""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from medgpt.data.sources.records import Conversation, Document, Message, Preferences, Record, Reject
from medgpt.data.tokenized import chat
from medgpt.data.tokenized.encode import Encoded, check_conversation, reject, tokens_of


class _Checks:
    """What a chat template cannot write."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        chat.check_template(tokenizer)
        self._control_tokens = chat.control_tokens(tokenizer)
        self._takes_system_message = chat.takes_system_message(tokenizer)

    def why_not(self, messages: Sequence[Message]) -> str | None:
        """Of a conversation that ends with the assistant; None if all is well."""
        if (reason := check_conversation(messages)) is not None:
            return reason
        if messages[0].role == "system" and not self._takes_system_message:
            return "the chat template takes no system message"
        for token in self._control_tokens:
            if any(token in message.content for message in messages):
                return f"a message contains the control token {token}"
        return None


class PreferenceEncoder:
    """Each answer after its prompt, as the chat template writes them, one after the other.

    A piece ends with the end token of its last turn, where generation stops. Targets are the
    assistant's turns after the prompt. A prompt loses its oldest pairs of turns, never its system
    message, until the longest piece has at most `max_length` tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
        self._checks = _Checks(tokenizer)
        self._tokenizer, self._max_length = tokenizer, max_length
        self._end = chat.turn_end(tokenizer)

    def __call__(self, record: Record) -> Encoded | Reject:
        if not isinstance(record, Preferences):
            return reject(record, f"{type(record).__name__.lower()} where preferences are needed")
        for answer in record.answers:
            if (reason := self._checks.why_not((*record.prompt, *answer))) is not None:
                return reject(record, reason)
        return self._encode(record, 0)

    def encode_batch(self, records: Sequence[Record]) -> list[Encoded | Reject]:
        return [self(record) for record in records]

    def _encode(self, record: Preferences, num_lost: int) -> Encoded | Reject:
        parts = [self._piece(record.prompt, answer) for answer in record.answers]
        pieces = [part for part in parts if part is not None]
        if len(pieces) < len(parts):
            return reject(record, "the chat template does not keep an answer from its prompt")
        longest = max(len(ids) for ids, _ in pieces)
        if longest > self._max_length:
            shorter = _without_oldest_pair(record.prompt)
            if shorter is None:
                reason = f"an answer with its question has {longest} tokens > {self._max_length}"
                return reject(record, reason, malformed=False)
            return self._encode(replace(record, prompt=shorter), num_lost + 2)
        return Encoded(
            input_ids=np.concatenate([ids for ids, _ in pieces]),
            targets=np.concatenate([targets for _, targets in pieces]),
            pieces=np.array([len(ids) for ids, _ in pieces], np.int32),
            grades=np.array(record.grades, np.float32),
            num_truncated_turns=num_lost,
        )

    def _piece(
        self, prompt: Sequence[Message], answer: Sequence[Message]
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]] | None:
        """(N,) ids and targets of one answer; None if its tokens are not its own."""
        messages = (*prompt, *answer)
        ((text, spans),) = chat.render_answers(self._tokenizer, [messages], self._end)
        batch = self._tokenizer(
            [text], add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        turns = [tokens for span in spans if (tokens := tokens_of(batch, 0, span)) is not None]
        if len(turns) < sum(message.role == "assistant" for message in messages):
            return None
        ids = np.array(batch["input_ids"][0][: turns[-1][1]], np.int32)
        targets = np.zeros(len(ids), np.bool_)
        for start, stop in turns[-sum(message.role == "assistant" for message in answer) :]:
            targets[start:stop] = True
        return ids, targets


class PromptEncoder:
    """What PPO generates from: a prompt with its whole history, up to where the answer begins.

    A conversation gives what precedes its last answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
        self._checks = _Checks(tokenizer)
        self._tokenizer, self._max_length = tokenizer, max_length

    def __call__(self, record: Record) -> Encoded | Reject:
        if isinstance(record, Document):
            return reject(record, "document where a prompt is needed")
        messages = record.prompt if isinstance(record, Preferences) else _prompt_of(record)
        if (reason := self._checks.why_not((*messages, Message("assistant", "-")))) is not None:
            return reject(record, reason)
        ids = np.array(chat.generation_ids(self._tokenizer, messages), np.int32)
        if len(ids) > self._max_length:
            reason = f"prompt of {len(ids)} tokens > max_length {self._max_length}"
            return reject(record, reason, malformed=False)
        said = [[message.role, message.content] for message in messages]
        return Encoded(
            input_ids=ids,
            targets=np.zeros(len(ids), np.bool_),
            messages=json.dumps(said, ensure_ascii=False),
        )

    def encode_batch(self, records: Sequence[Record]) -> list[Encoded | Reject]:
        return [self(record) for record in records]


def _prompt_of(conversation: Conversation) -> tuple[Message, ...]:
    """Without its last answer, if it has one."""
    messages = conversation.messages
    return messages[:-1] if messages[-1].role == "assistant" else messages


def _without_oldest_pair(prompt: tuple[Message, ...]) -> tuple[Message, ...] | None:
    """None if there is only one question."""
    num_system = int(prompt[0].role == "system")
    if len(prompt) - num_system < 3:
        return None
    return prompt[:num_system] + prompt[num_system + 2 :]

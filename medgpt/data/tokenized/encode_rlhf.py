"""Encodes preferences and prompts as token ids for reward models, DPO and PPO."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from medgpt.data.sources.records import (
    Conversation,
    Document,
    Message,
    Preferences,
    Record,
    Reject,
    prompt_to_json,
)
from medgpt.data.tokenized import chat_template
from medgpt.data.tokenized.encode import (
    NOT_KEPT,
    ChatEncoder,
    EncodedSample,
    drop_exchanges,
    target_mask,
)


class PreferenceEncoder(ChatEncoder):
    """Encodes the prompt with each answer as one sequence, and concatenates the sequences.

    A sequence ends with the end token of its last turn, where generation stops. Targets are the
    assistant's turns after the prompt. A prompt loses its oldest exchanges, never its system
    message, until the longest sequence has at most `max_length` tokens.
    """

    def __call__(self, record: Record) -> EncodedSample | Reject:
        if not isinstance(record, Preferences):
            return Reject.of(
                record, f"{type(record).__name__.lower()} where preferences are needed"
            )
        for answer in record.answers:
            if (reason := self.reject_reason((*record.prompt, *answer))) is not None:
                return Reject.of(record, reason)
        return self._encode(record, 0)

    def _encode(self, record: Preferences, num_truncated: int) -> EncodedSample | Reject:
        tokenized = self.tokenize([(*record.prompt, *answer) for answer in record.answers])
        sequences: list[NDArray[np.int32]] = []
        targets: list[NDArray[np.bool_]] = []
        for answer, tokens in zip(record.answers, tokenized, strict=True):
            if tokens is None:
                return Reject.of(record, NOT_KEPT)
            ids, turns = tokens
            num_turns = sum(message.role == "assistant" for message in answer)
            sequences.append(ids[: turns[-1][1]])
            targets.append(target_mask(turns[-1][1], turns[-num_turns:]))
        longest = max(map(len, sequences))
        if longest > self._max_length:
            if sum(message.role == "user" for message in record.prompt) == 1:
                reason = f"an answer with its question has {longest} tokens > {self._max_length}"
                return Reject.of(record, reason, malformed=False)
            shorter = replace(record, prompt=drop_exchanges(record.prompt, 1))
            num_dropped = len(record.prompt) - len(shorter.prompt)
            return self._encode(shorter, num_truncated + num_dropped)
        return EncodedSample(
            input_ids=np.concatenate(sequences),
            targets=np.concatenate(targets),
            sequence_lengths=np.array(list(map(len, sequences)), np.int32),
            grades=np.array(record.grades, np.float32),
            num_truncated_turns=num_truncated,
        )


class PromptEncoder(ChatEncoder):
    """Encodes prompts for PPO: the whole history, up to where the answer starts.

    A conversation is cut before its last answer.
    """

    def __call__(self, record: Record) -> EncodedSample | Reject:
        if isinstance(record, Document):
            return Reject.of(record, "document where a prompt is needed")
        messages = record.prompt if isinstance(record, Preferences) else record.messages
        if isinstance(record, Conversation) and messages[-1].role == "assistant":
            messages = messages[:-1]
        if (reason := self.reject_reason((*messages, Message("assistant", "-")))) is not None:
            return Reject.of(record, reason)
        ids = np.array(chat_template.generation_prompt_ids(self._tokenizer, messages), np.int32)
        if len(ids) > self._max_length:
            reason = f"prompt of {len(ids)} tokens > max_length {self._max_length}"
            return Reject.of(record, reason, malformed=False)
        return EncodedSample(
            input_ids=ids,
            targets=np.zeros(len(ids), np.bool_),
            messages=prompt_to_json(messages, record.tools),
        )

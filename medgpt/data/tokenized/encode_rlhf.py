"""Encodes preferences and prompts as token ids for reward models, DPO and PPO."""

from dataclasses import replace
from typing import ClassVar

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
from medgpt.data.tokenized.conversation import drop_exchanges
from medgpt.data.tokenized.encode import (
    NOT_RENDERED,
    ChatEncoder,
    EncodedSample,
    target_mask,
)
from medgpt.data.tokenized.parts import Chat

ONE_ANSWER = "a single answer, labeled good or bad, makes no pair; `medgpt dpo` with loss=kto can"


class PreferenceEncoder(ChatEncoder):
    """Encodes the prompt with each answer as one sequence, and concatenates the sequences.

    A sequence ends with the end token of its last turn, where generation stops. Targets are the
    assistant's turns after the prompt. A prompt loses its oldest exchanges, never its system
    message, until the longest sequence has at most `max_length` tokens.
    """

    needs_pairs: ClassVar[bool] = True
    """Whether an answer without another to the same prompt is set aside."""

    def __call__(self, record: Record) -> EncodedSample | Reject:
        if not isinstance(record, Preferences):
            return Reject.of(
                record, f"{type(record).__name__.lower()} where preferences are needed"
            )
        if self.needs_pairs and len(record.answers) == 1:
            return Reject.of(record, ONE_ANSWER, malformed=False)
        prompt, changes = self._options.apply(record.prompt)
        answers = []
        for answer in record.answers:
            applied, change = self._options.apply(answer)
            if (reason := self.reject_reason((*prompt, *applied), record.tools)) is not None:
                return Reject.of(record, reason)
            answers.append(applied)
            changes = {key: changes.get(key, 0) + change.get(key, 0) for key in changes | change}
        record = replace(record, prompt=prompt, answers=tuple(answers))
        encoded = self._encode(record, 0)
        return encoded if isinstance(encoded, Reject) else replace(encoded, changes=changes)

    def _encode(self, record: Preferences, num_truncated: int) -> EncodedSample | Reject:
        num_prompt = len(record.prompt)
        chats = []
        for answer in record.answers:
            messages = (*record.prompt, *answer)
            turns = [i for i in range(num_prompt, len(messages)) if messages[i].role == "assistant"]
            chats.append(Chat(messages, turns, record.tools))
        sequences: list[NDArray[np.int32]] = []
        targets: list[NDArray[np.bool_]] = []
        for found in self.tokenize(chats):
            if found is None or len(found) > 1:  # a sequence has one score
                return Reject.of(record, NOT_RENDERED)
            stop = found[0].turns[-1][1]
            sequences.append(found[0].ids[:stop])
            targets.append(target_mask(stop, found[0].turns))
        longest = max(map(len, sequences))
        if longest > self._max_length:
            if sum(message.role == "user" for message in record.prompt) == 1:
                reason = f"an answer with its question has {longest} tokens > {self._max_length}"
                return Reject.of(record, reason, malformed=False)
            shorter = replace(record, prompt=drop_exchanges(record.prompt, 1))
            return self._encode(shorter, num_truncated + num_prompt - len(shorter.prompt))
        return EncodedSample(
            input_ids=np.concatenate(sequences),
            targets=np.concatenate(targets),
            sequence_lengths=np.array(list(map(len, sequences)), np.int32),
            grades=np.array(record.grades, np.float32),
            num_truncated_turns=num_truncated,
        )


class LabeledAnswerEncoder(PreferenceEncoder):
    """Encodes prompts with single answers, too, which are labeled good or bad."""

    needs_pairs = False


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
        messages, changes = self._options.apply(messages)
        answered = (*messages, Message("assistant", "-"))
        if (reason := self.reject_reason(answered, record.tools)) is not None:
            return Reject.of(record, reason)
        ids = np.array(
            chat_template.generation_prompt_ids(
                self._tokenizer, messages, record.tools, thinking=self._options.prompt_thinking
            ),
            np.int32,
        )
        if len(ids) > self._max_length:
            reason = f"prompt of {len(ids)} tokens > max_length {self._max_length}"
            return Reject.of(record, reason, malformed=False)
        return EncodedSample(
            input_ids=ids,
            targets=np.zeros(len(ids), np.bool_),
            messages=prompt_to_json(messages, record.tools),
            changes=changes,
        )

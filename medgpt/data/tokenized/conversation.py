"""Conversations before they are rendered: the order of their turns, and what the config removes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from medgpt.data.sources.records import Message
from medgpt.data.sources.turns import may_follow
from medgpt.data.tokenized.thoughts import THINK_END, split_thought

Messages = tuple[Message, ...]
Changes = dict[str, int]
"""What became of messages by the options of the data -> how many."""


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """What becomes of system messages, thoughts and earlier turns; see config.data.DataConfig."""

    system: Literal["keep", "fold", "drop"] = "keep"
    thinking: Literal["keep", "strip"] = "keep"
    turns: Literal["all", "last"] = "all"
    prompt_thinking: bool | None = None  # of prompts only; None is the template's default

    def apply(self, messages: Messages) -> tuple[Messages, Changes]:
        """Return the messages after `system` and `thinking`, and what was changed."""
        changes: Changes = {}
        if messages and messages[0].role == "system":
            messages, changes = _apply_system(messages, self.system)
        if self.thinking == "strip":
            stripped = tuple(map(_without_thought, messages))
            if number := sum(a != b for a, b in zip(messages, stripped, strict=True)):
                changes["thoughts removed from answers"] = number
            messages = stripped
        return messages, changes

    def learned_answers(self, messages: Messages) -> list[int]:
        """Return the numbers of the messages that are learned."""
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        wanted = answers[-1:] if self.turns == "last" else answers
        return [i for i in wanted if messages[i].learn]


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


def drop_exchanges(messages: Messages, num: int) -> Messages:
    """Remove the oldest `num` questions with all that follows each, but not the system message."""
    num_system = int(messages[0].role == "system")
    questions = [i for i, message in enumerate(messages) if message.role == "user"]
    return messages[:num_system] + messages[questions[num] :]


def _apply_system(
    messages: Messages, rule: Literal["keep", "fold", "drop"]
) -> tuple[Messages, Changes]:
    """Keep, fold into the first question, or drop the system message, with which they begin."""
    system, *rest = messages
    if not system.content.strip():
        return tuple(rest), {}
    if rule == "keep" or not rest:
        return messages, {}
    if rule == "drop":
        return tuple(rest), {"system messages dropped": 1}
    folded = replace(rest[0], content=f"{system.content.strip()}\n\n{rest[0].content.strip()}")
    return (folded, *rest[1:]), {"system messages folded into the first question": 1}


def _without_thought(message: Message) -> Message:
    if message.role != "assistant" or THINK_END not in message.content:
        return message
    return replace(message, content=split_thought(message.content).answer)

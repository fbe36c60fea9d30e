"""The thought that a reasoning model writes before its answer, between <think> and </think>."""

import re
from typing import NamedTuple

THINK_START = "<think>"
THINK_END = "</think>"
_CHANNEL_END = re.compile(r"<\|channel\|>final[^<]*<\|message\|>")  # gpt-oss
_CHANNEL_START = re.compile(r"<\|channel\|>")


class ThoughtAndAnswer(NamedTuple):
    thought: str  # empty if the text has none
    answer: str


def split_thought(text: str) -> ThoughtAndAnswer:
    """Split the content of a message, without surrounding space. The start tag may be missing.

    A thought that does not end belongs to the answer: see `thought_error`.
    """
    thought, end, answer = text.partition(THINK_END)
    if not end:
        return ThoughtAndAnswer("", text.strip())
    return ThoughtAndAnswer(thought.replace(THINK_START, "", 1).strip(), answer.strip())


def thought_error(text: str, tool_calls: str | None = None) -> str | None:
    """Return what is wrong with the thought of an answer in the data, or None."""
    thought, answer = split_thought(text)
    if THINK_START in answer or THINK_END in answer:
        return "an answer has a thought that does not end, or several thoughts"
    if THINK_START in thought:
        return "an answer has a thought inside a thought"
    if THINK_END in text:
        before, start, _ = text.partition(THINK_END)[0].partition(THINK_START)
        if start and before.strip():
            return "an answer has text before its thought"
        if not answer and tool_calls is None:
            return "an answer has a thought and nothing after it"
    return None


def opens_thought(prompt: str) -> bool:
    """Return whether the prompt begins the thought, so that a model goes on inside it."""
    return prompt.rfind(THINK_START) > prompt.rfind(THINK_END) and prompt.rstrip().endswith(
        THINK_START
    )


def closes_thought(prompt: str) -> bool:
    """Return whether the prompt ends with a thought that is over, so that a model answers."""
    return prompt.rstrip().endswith(THINK_END)


def text_after_thought(text: str, *, starts_inside: bool = False) -> str:
    """Return the part of a generated text that is its answer; empty if the thought did not end.

    Args:
        starts_inside: the prompt began the thought.
    """
    if channels := list(_CHANNEL_END.finditer(text)):
        return text[channels[-1].end() :]
    if _CHANNEL_START.search(text):
        return ""
    _, end, answer = text.rpartition(THINK_END)
    if end:
        return "" if THINK_START in answer else answer
    return "" if starts_inside or THINK_START in text else text

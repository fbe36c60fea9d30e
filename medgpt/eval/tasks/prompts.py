"""The prompt around a question."""

from typing import Literal

from medgpt.data.sources.records import Message
from medgpt.eval.requests import Prompt


def as_prompt(text: str, prompt: Literal["plain", "chat"]) -> Prompt:
    """Return the text as a user message, or as a line for a model without chat template."""
    return (Message("user", text),) if prompt == "chat" else f"{text}\n"

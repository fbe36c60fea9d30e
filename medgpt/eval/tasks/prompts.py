"""What a task puts around a question."""

from typing import Literal

from medgpt.data.sources.records import Message
from medgpt.eval.requests import Prompt


def as_prompt(text: str, prompt: Literal["plain", "chat"]) -> Prompt:
    """A turn of a conversation, or for a model without chat template a line to go on after."""
    return (Message("user", text),) if prompt == "chat" else f"{text}\n"

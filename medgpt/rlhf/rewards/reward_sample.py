"""The record that reward functions receive."""

from dataclasses import dataclass

from medgpt.data.sources.records import Message


@dataclass(frozen=True, slots=True)
class RewardSample:
    sample_id: str
    messages: tuple[Message, ...]  # the prompt with its history; ends with the user or a tool
    text: str  # the answer
    finished: bool  # False if cut off at rollout.max_new_tokens
    tools: str | None = None  # JSON list of the tools that the prompt offers

    @property
    def question(self) -> str:
        """The last turn of the user."""
        return next(m.content for m in reversed(self.messages) if m.role == "user")

    @property
    def said(self) -> str:
        """All user turns, one per line."""
        return "\n".join(m.content for m in self.messages if m.role == "user")


Answered = RewardSample
"""Former name, kept for users' reward functions."""

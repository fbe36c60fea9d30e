"""The record that reward functions receive."""

from dataclasses import dataclass

from medgpt.data.sources.records import Message


@dataclass(frozen=True, slots=True)
class RewardSample:
    sample_id: str
    messages: tuple[Message, ...]  # the prompt with its history; the last turn is the user's
    text: str  # the answer
    finished: bool  # False if cut off at rollout.max_new_tokens

    @property
    def question(self) -> str:
        """The last turn of the prompt."""
        return self.messages[-1].content

    @property
    def said(self) -> str:
        """All user turns, one per line."""
        return "\n".join(m.content for m in self.messages if m.role == "user")


Answered = RewardSample
"""Former name, kept for users' reward functions."""

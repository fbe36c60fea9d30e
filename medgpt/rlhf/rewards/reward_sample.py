"""What a reward component sees of a sample."""

from dataclasses import dataclass

from medgpt.data.sources.records import Message


@dataclass(frozen=True, slots=True)
class RewardSample:
    sample_id: str
    messages: tuple[Message, ...]  # the prompt with its history, a user's turn last
    text: str  # the answer
    finished: bool  # False where it was cut at the longest length

    @property
    def question(self) -> str:
        """The last turn of the prompt."""
        return self.messages[-1].content

    @property
    def said(self) -> str:
        """All that the user has said, a line each."""
        return "\n".join(m.content for m in self.messages if m.role == "user")


Answered = RewardSample
"""The former name, which reward functions of users import."""

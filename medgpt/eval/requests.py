"""What a task asks of a model, and what comes back."""

from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from medgpt.data.sources.records import Message

Prompt = str | tuple[Message, ...]
"""A text to continue, or a conversation that the model's chat template writes."""


@dataclass(frozen=True, slots=True)
class Choose:
    """How likely is each option after the prompt?"""

    id: str
    prompt: Prompt
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Chosen:
    id: str
    logprobs: list[float]  # natural log, summed over each option
    tokens: list[int]  # of each option
    characters: list[int]  # of each option, without the space around it
    cut: bool = False  # the prompt was too long for the model and lost its beginning


@dataclass(frozen=True, slots=True)
class Weigh:
    """How likely is the text?"""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Weighed:
    id: str
    nll: float  # nats, summed over the tokens that have something before them
    tokens: int
    characters: int  # of those tokens


@dataclass(frozen=True, slots=True)
class Reply:
    """What does the model say? A temperature of 0 always takes the likeliest token."""

    id: str
    prompt: Prompt
    max_new_tokens: int
    temperature: float = 0.0
    samples: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Replied:
    id: str
    texts: list[str]  # one for each sample
    finished: list[bool]  # False where max_new_tokens came before the end
    cut: bool = False  # the prompt was too long for the model and lost its beginning


Request = Choose | Weigh | Reply
Response = Chosen | Weighed | Replied
RESPONSES: dict[str, type[Response]] = {cls.__name__: cls for cls in (Chosen, Weighed, Replied)}


def blank(request: Request) -> Response:
    """A response as any model could give it."""
    match request:
        case Choose():
            count = len(request.options)
            return Chosen(request.id, [-1.0] * count, [1] * count, [1] * count)
        case Weigh():
            return Weighed(request.id, 1.0, 1, 1)
        case Reply():
            return Replied(request.id, ["a b c d e"] * request.samples, [True] * request.samples)


def fingerprint(request: Request) -> str:
    """Equal for equal requests only: a kept response to another one is not taken."""
    return xxhash.xxh3_64_hexdigest(repr(request).encode())


def to_json(response: Response) -> dict[str, Any]:
    return {"kind": type(response).__name__, **asdict(response)}


def from_json(tree: dict[str, Any]) -> Response:
    return RESPONSES[tree["kind"]](**{k: v for k, v in tree.items() if k != "kind"})

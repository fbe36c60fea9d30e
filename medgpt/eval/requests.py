"""What a task asks of a model, and what comes back."""

from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from medgpt.data.sources.records import Message

Prompt = str | tuple[Message, ...]
"""A text to continue, or a conversation that the model's chat template writes."""


@dataclass(frozen=True, slots=True)
class Loglikelihood:
    """How likely is each option after the prompt?"""

    id: str
    prompt: Prompt
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LoglikelihoodResponse:
    id: str
    logprobs: list[float]  # natural log, summed over each option
    tokens: list[int]  # of each option
    characters: list[int]  # of each option, without the space around it
    cut: bool = False  # the prompt was too long for the model and lost its beginning


@dataclass(frozen=True, slots=True)
class RollingLoglikelihood:
    """How likely is the text?"""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class RollingLoglikelihoodResponse:
    id: str
    nll: float  # nats, summed over the tokens that have something before them
    tokens: int
    characters: int  # of those tokens


@dataclass(frozen=True, slots=True)
class Generate:
    """What does the model say? A temperature of 0 always takes the likeliest token."""

    id: str
    prompt: Prompt
    max_new_tokens: int
    temperature: float = 0.0
    samples: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class GenerateResponse:
    id: str
    texts: list[str]  # one for each sample
    finished: list[bool]  # False where max_new_tokens came before the end
    cut: bool = False  # the prompt was too long for the model and lost its beginning


Request = Loglikelihood | RollingLoglikelihood | Generate
Response = LoglikelihoodResponse | RollingLoglikelihoodResponse | GenerateResponse
REQUEST_NAMES: dict[type[Request], str] = {  # in files on disk
    Loglikelihood: "Choose",
    RollingLoglikelihood: "Weigh",
    Generate: "Reply",
}
RESPONSE_NAMES: dict[type[Response], str] = {  # in files on disk
    LoglikelihoodResponse: "Chosen",
    RollingLoglikelihoodResponse: "Weighed",
    GenerateResponse: "Replied",
}
RESPONSE_TYPES = {name: cls for cls, name in RESPONSE_NAMES.items()}


def dummy_response(request: Request) -> Response:
    """A response as any model could give it."""
    match request:
        case Loglikelihood():
            num_options = len(request.options)
            return LoglikelihoodResponse(
                request.id, [-1.0] * num_options, [1] * num_options, [1] * num_options
            )
        case RollingLoglikelihood():
            return RollingLoglikelihoodResponse(request.id, 1.0, 1, 1)
        case Generate():
            return GenerateResponse(
                request.id, ["a b c d e"] * request.samples, [True] * request.samples
            )


def fingerprint(request: Request) -> str:
    """Equal for equal requests only: a kept response to another one is not taken."""
    name = REQUEST_NAMES[type(request)]
    return xxhash.xxh3_64_hexdigest(repr_as(name, request).encode())


def repr_as(name: str, record: object) -> str:
    """`repr` of a dataclass under a name that stays when the class is renamed."""
    return name + repr(record).removeprefix(type(record).__qualname__)


def to_json(response: Response) -> dict[str, Any]:
    return {"kind": RESPONSE_NAMES[type(response)], **asdict(response)}


def from_json(record: dict[str, Any]) -> Response:
    return RESPONSE_TYPES[record["kind"]](**{k: v for k, v in record.items() if k != "kind"})

"""The requests that tasks send to a model, and the responses to them."""

from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from medgpt.data.sources.records import Message

Prompt = str | tuple[Message, ...]
"""A text to continue, or messages that the chat template of the model formats."""


@dataclass(frozen=True, slots=True)
class Loglikelihood:
    """Ask for the log-likelihood of each option after the prompt."""

    id: str
    prompt: Prompt
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LoglikelihoodResponse:
    id: str
    logprobs: list[float]  # natural log, summed over each option
    tokens: list[int]  # per option
    characters: list[int]  # per option, without surrounding spaces
    cut: bool = False  # the prompt was too long for the model and lost its first tokens


@dataclass(frozen=True, slots=True)
class RollingLoglikelihood:
    """Ask for the log-likelihood of a whole text."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class RollingLoglikelihoodResponse:
    id: str
    nll: float  # nats, summed over all tokens that follow another one
    tokens: int
    characters: int  # in those tokens


@dataclass(frozen=True, slots=True)
class Generate:
    """Ask for generated replies; temperature 0 decodes greedily."""

    id: str
    prompt: Prompt
    max_new_tokens: int
    temperature: float = 0.0
    samples: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class GenerateResponse:
    id: str
    texts: list[str]  # one per sample
    finished: list[bool]  # False if max_new_tokens was reached first
    cut: bool = False  # the prompt was too long for the model and lost its first tokens


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
    """Return a valid response that needs no model."""
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
    """Return a hash of a request; a stored response counts only if the hash is unchanged."""
    name = REQUEST_NAMES[type(request)]
    return xxhash.xxh3_64_hexdigest(repr_as(name, request).encode())


def repr_as(name: str, record: object) -> str:
    """Return `repr(record)` with a fixed class name, so that hashes survive a rename."""
    return name + repr(record).removeprefix(type(record).__qualname__)


def to_json(response: Response) -> dict[str, Any]:
    return {"kind": RESPONSE_NAMES[type(response)], **asdict(response)}


def from_json(record: dict[str, Any]) -> Response:
    return RESPONSE_TYPES[record["kind"]](**{k: v for k, v in record.items() if k != "kind"})

"""The requests that tasks send to a model, and the responses to them."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import xxhash

from medgpt.data.sources.records import Message

Prompt = str | tuple[Message, ...]
"""A text to continue, or messages that the chat template of the model formats."""


def as_prompt(text: str, style: Literal["plain", "chat"]) -> Prompt:
    """Return the text as a user message, or as a line for a model without chat template."""
    return (Message("user", text),) if style == "chat" else f"{text}\n"


@dataclass(frozen=True, slots=True)
class Loglikelihood:
    """Ask for the log-likelihood of each option after the prompt."""

    name_on_disk: ClassVar[str] = "Choose"
    id: str
    prompt: Prompt
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LoglikelihoodResponse:
    name_on_disk: ClassVar[str] = "Chosen"
    id: str
    logprobs: list[float]  # natural log, summed over each option
    tokens: list[int]  # per option
    characters: list[int]  # per option, without surrounding spaces
    cut: bool = False  # the prompt was too long for the model and lost its first tokens


@dataclass(frozen=True, slots=True)
class RollingLoglikelihood:
    """Ask for the log-likelihood of a whole text."""

    name_on_disk: ClassVar[str] = "Weigh"
    id: str
    text: str


@dataclass(frozen=True, slots=True)
class RollingLoglikelihoodResponse:
    name_on_disk: ClassVar[str] = "Weighed"
    id: str
    nll: float  # nats, summed over all tokens that follow another one
    tokens: int
    characters: int  # in those tokens


@dataclass(frozen=True, slots=True)
class Generate:
    """Ask for generated replies; temperature 0 decodes greedily."""

    name_on_disk: ClassVar[str] = "Reply"
    id: str
    prompt: Prompt
    max_new_tokens: int
    temperature: float = 0.0
    samples: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class GenerateResponse:
    name_on_disk: ClassVar[str] = "Replied"
    id: str
    texts: list[str]  # one per sample
    finished: list[bool]  # False if max_new_tokens was reached first
    cut: bool = False  # the prompt was too long for the model and lost its first tokens


Request = Loglikelihood | RollingLoglikelihood | Generate
Response = LoglikelihoodResponse | RollingLoglikelihoodResponse | GenerateResponse
RESPONSE_TYPES: dict[str, type[Response]] = {
    cls.name_on_disk: cls
    for cls in (LoglikelihoodResponse, RollingLoglikelihoodResponse, GenerateResponse)
}


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


def reply_texts(response: Response) -> list[str]:
    assert isinstance(response, GenerateResponse)
    return response.texts


def fingerprint(request: Request) -> str:
    """Return a hash of a request; a stored response counts only if the hash is unchanged."""
    return xxhash.xxh3_64_hexdigest(repr_as(request.name_on_disk, request).encode())


def repr_as(name: str, record: object) -> str:
    """Return `repr(record)` with a fixed class name, so that hashes survive a rename."""
    return name + repr(record).removeprefix(type(record).__qualname__)


def to_json(response: Response) -> dict[str, Any]:
    return {"kind": response.name_on_disk, **asdict(response)}


def from_json(record: dict[str, Any]) -> Response:
    return RESPONSE_TYPES[record["kind"]](**{k: v for k, v in record.items() if k != "kind"})

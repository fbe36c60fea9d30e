"""One model that answers the requests of tasks, in one process."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import xxhash

from medgpt.config.base import ConfigError
from medgpt.config.evaluation import PoolConfig
from medgpt.data.tokenized.chat import stop_ids
from medgpt.eval.requests import (
    Choose,
    Chosen,
    Prompt,
    Replied,
    Reply,
    Request,
    Response,
    Weigh,
    Weighed,
)
from medgpt.models.generate import document_ends, load_for_generation, reply_all
from medgpt.models.prompts import choice_ids, prompt_ids, text_ids
from medgpt.models.scoring import Scorer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Engine:
    """Scores and replies in batches of similar length."""

    def __init__(
        self,
        folder: str,
        *,
        precision: str,
        pool: PoolConfig,
        trust_remote_code: bool = False,
        fresh_seed: int | None = None,
    ) -> None:
        """Load the model in `folder` on the GPU, if there is one; with fresh weights if a seed for
        them is given.

        Raises:
            ConfigError: there is no causal model in it.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        default = torch.bfloat16 if device.type == "cuda" else torch.float32
        model, self.tokenizer = load_for_generation(
            folder, device, trust_remote_code=trust_remote_code, fresh_seed=fresh_seed
        )
        self.model: Any = model.to(DTYPES.get(precision, default))  # type: ignore[arg-type]
        self.pool = pool
        self.scorer = Scorer(
            self.model, batch_tokens=pool.batch_tokens, window_tokens=pool.window_tokens
        )

    def run(self, requests: Sequence[Request]) -> list[Response]:
        """A response to each, in any order."""
        return [
            *self._choose([r for r in requests if isinstance(r, Choose)]),
            *self._weigh([r for r in requests if isinstance(r, Weigh)]),
            *self._reply([r for r in requests if isinstance(r, Reply)]),
        ]

    def _choose(self, requests: Sequence[Choose]) -> list[Response]:
        choices, cut = [], []
        for request in requests:
            choice = choice_ids(self.tokenizer, request.prompt, request.options)
            longest = max(len(option) for option in choice.options)
            room = self.scorer.positions - longest + 1
            if room < 1:
                raise ConfigError(
                    f"question {request.id} has an option of {longest} tokens, the model has "
                    f"{self.scorer.positions} positions; remove the question, or use scoring=letter"
                )
            cut.append(len(choice.prompt) > room)
            choices.append(replace(choice, prompt=choice.prompt[-room:]))
        found = self.scorer.choose(choices)
        return [
            Chosen(
                request.id,
                logprobs,
                [len(option) for option in choice.options],
                [len(option.strip()) for option in request.options],
                was_cut,
            )
            for request, choice, logprobs, was_cut in zip(
                requests, choices, found, cut, strict=True
            )
        ]

    def _weigh(self, requests: Sequence[Weigh]) -> list[Response]:
        texts = [text_ids(self.tokenizer, request.text) for request in requests]
        found = self.scorer.weigh([ids for ids, _ in texts])
        return [
            Weighed(request.id, -sum(logprobs), len(logprobs), characters)
            for request, (_, characters), logprobs in zip(requests, texts, found, strict=True)
        ]

    def _reply(self, requests: Sequence[Reply]) -> list[Response]:
        groups: dict[tuple[bool, int, float], list[tuple[Reply, list[int], int]]] = {}
        cut = {}
        for request in requests:
            ids = prompt_ids(self.tokenizer, request.prompt)
            room = self.scorer.positions - request.max_new_tokens
            if room < 1:
                raise ConfigError(
                    f"max_new_tokens={request.max_new_tokens} leaves no room for a prompt, the "
                    f"model has {self.scorer.positions} positions; lower it"
                )
            cut[request.id] = len(ids) > room
            key = (isinstance(request.prompt, str), request.max_new_tokens, request.temperature)
            for sample in range(request.samples):
                groups.setdefault(key, []).append((request, ids[-room:], sample))
        said: dict[str, dict[int, tuple[str, bool]]] = {request.id: {} for request in requests}
        for (plain, length, temperature), asked in groups.items():
            asked.sort(key=lambda item: len(item[1]))
            for start in range(0, len(asked), self.pool.batch_replies):
                batch = asked[start : start + self.pool.batch_replies]
                replies = reply_all(
                    self.model,
                    self.tokenizer,
                    [ids for _, ids, _ in batch],
                    (document_ends if plain else stop_ids)(self.tokenizer),
                    max_new_tokens=length,
                    temperature=temperature,
                    seeds=[sample_seed(request, sample) for request, _, sample in batch],
                )
                for (request, _, sample), reply in zip(batch, replies, strict=True):
                    said[request.id][sample] = reply
        return [
            Replied(
                request.id,
                [said[request.id][sample][0] for sample in range(request.samples)],
                [said[request.id][sample][1] for sample in range(request.samples)],
                cut[request.id],
            )
            for request in requests
        ]


def sample_seed(request: Reply, sample: int) -> int:
    """A function of the request's id and seed, so the same in every batch and on every worker."""
    return xxhash.xxh3_64_intdigest(f"{request.seed} {sample} {request.id}".encode()) >> 1


def size(request: Request) -> int:
    """Characters, to put requests of similar length together."""
    match request:
        case Weigh():
            return len(request.text)
        case Choose():
            return _size(request.prompt) + sum(map(len, request.options))
        case Reply():
            return _size(request.prompt)


def _size(prompt: Prompt) -> int:
    if isinstance(prompt, str):
        return len(prompt)
    return sum(len(message.content) for message in prompt)

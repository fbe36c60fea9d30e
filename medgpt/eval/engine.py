"""One causal language model that answers evaluation requests, in one process."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import xxhash

from medgpt.config.base import ConfigError
from medgpt.config.evaluation import EvalPoolConfig
from medgpt.config.pools import Precision
from medgpt.data.tokenized.chat_template import stop_token_ids
from medgpt.eval.requests import (
    Generate,
    GenerateResponse,
    Loglikelihood,
    LoglikelihoodResponse,
    Prompt,
    Request,
    Response,
    RollingLoglikelihood,
    RollingLoglikelihoodResponse,
)
from medgpt.models.generate import generate_responses, load_for_generation
from medgpt.models.load import compute_dtype
from medgpt.models.loglikelihood import LoglikelihoodScorer
from medgpt.models.prompts import encode_prompt, encode_prompt_options, encode_text
from medgpt.models.stops import document_stop_ids


class EvalEngine:
    """Answers requests in batches of similar length."""

    def __init__(
        self,
        model_folder: str,
        *,
        precision: Precision,
        pool: EvalPoolConfig,
        trust_remote_code: bool = False,
        fresh_seed: int | None = None,
        thinking: bool | None = None,
        thinking_tokens: int | None = None,
    ) -> None:
        """Load the model on the GPU if there is one, else on the CPU.

        Args:
            fresh_seed: draw new weights with this seed instead of loading the saved ones.
            thinking: whether the model thinks before its replies; None is its template's default.
            thinking_tokens: maximum tokens of a thought.

        Raises:
            ConfigError: the folder holds no causal language model.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = compute_dtype(precision, device.type)
        self.model: Any
        self.model, self.tokenizer = load_for_generation(
            model_folder,
            device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            init_seed=fresh_seed,
        )
        self.pool, self.thinking, self.thinking_tokens = pool, thinking, thinking_tokens
        self.scorer = LoglikelihoodScorer(
            self.model, batch_tokens=pool.batch_tokens, window_tokens=pool.window_tokens
        )

    def run(self, requests: Sequence[Request]) -> list[Response]:
        """Return one response per request, grouped by kind of request."""
        return [
            *self._score_options([r for r in requests if isinstance(r, Loglikelihood)]),
            *self._score_texts([r for r in requests if isinstance(r, RollingLoglikelihood)]),
            *self._generate([r for r in requests if isinstance(r, Generate)]),
        ]

    def _score_options(self, requests: Sequence[Loglikelihood]) -> list[Response]:
        choices, were_cut = [], []
        for request in requests:
            choice = encode_prompt_options(self.tokenizer, request.prompt, request.options)
            longest = max(len(option) for option in choice.options)
            max_prompt_tokens = self.scorer.max_positions - longest + 1
            if max_prompt_tokens < 1:
                raise ConfigError(
                    f"question {request.id} has an option of {longest} tokens, but the model "
                    f"has {self.scorer.max_positions} positions; remove the question, or use "
                    "scoring=letter"
                )
            were_cut.append(len(choice.prompt) > max_prompt_tokens)
            choices.append(replace(choice, prompt=choice.prompt[-max_prompt_tokens:]))
        option_logprobs = self.scorer.option_logprobs(choices)
        return [
            LoglikelihoodResponse(
                request.id,
                logprobs,
                [len(option) for option in choice.options],
                [len(option.strip()) for option in request.options],
                was_cut,
            )
            for request, choice, logprobs, was_cut in zip(
                requests, choices, option_logprobs, were_cut, strict=True
            )
        ]

    def _score_texts(self, requests: Sequence[RollingLoglikelihood]) -> list[Response]:
        texts = [encode_text(self.tokenizer, request.text) for request in requests]
        token_logprobs = self.scorer.rolling_logprobs([ids for ids, _ in texts])
        return [
            RollingLoglikelihoodResponse(request.id, -sum(logprobs), len(logprobs), characters)
            for request, (_, characters), logprobs in zip(
                requests, texts, token_logprobs, strict=True
            )
        ]

    def _generate(self, requests: Sequence[Generate]) -> list[Response]:
        groups: dict[tuple[bool, int, float], list[tuple[Generate, list[int], int]]] = {}
        was_cut = {}
        for request in requests:
            ids = encode_prompt(self.tokenizer, request.prompt, self.thinking)
            max_prompt_tokens = self.scorer.max_positions - request.max_new_tokens
            if max_prompt_tokens < 1:
                raise ConfigError(
                    f"max_new_tokens={request.max_new_tokens} leaves no room for a prompt: the "
                    f"model has {self.scorer.max_positions} positions; lower it"
                )
            was_cut[request.id] = len(ids) > max_prompt_tokens
            key = (isinstance(request.prompt, str), request.max_new_tokens, request.temperature)
            for sample in range(request.samples):
                groups.setdefault(key, []).append((request, ids[-max_prompt_tokens:], sample))
        results: dict[tuple[str, int], tuple[str, bool]] = {}
        for (is_plain, max_new_tokens, temperature), group in groups.items():
            group.sort(key=lambda item: len(item[1]))
            for start in range(0, len(group), self.pool.batch_replies):
                batch = group[start : start + self.pool.batch_replies]
                replies = generate_responses(
                    self.model,
                    self.tokenizer,
                    [ids for _, ids, _ in batch],
                    (document_stop_ids if is_plain else stop_token_ids)(self.tokenizer),
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    thinking_tokens=None if is_plain else self.thinking_tokens,
                    seeds=[sample_seed(request, sample) for request, _, sample in batch],
                )
                for (request, _, sample), reply in zip(batch, replies, strict=True):
                    results[request.id, sample] = reply
        responses = []
        for request in requests:
            samples = [results[request.id, sample] for sample in range(request.samples)]
            texts, finished = [text for text, _ in samples], [end for _, end in samples]
            responses.append(GenerateResponse(request.id, texts, finished, was_cut[request.id]))
        return responses


def sample_seed(request: Generate, sample: int) -> int:
    """Return a seed that depends on the request alone, not on its batch or its worker."""
    return xxhash.xxh3_64_intdigest(f"{request.seed} {sample} {request.id}".encode()) >> 1


def num_characters(request: Request) -> int:
    """Return the length of a request in characters, for batches of similar length."""
    match request:
        case RollingLoglikelihood():
            return len(request.text)
        case Loglikelihood():
            return _num_prompt_characters(request.prompt) + sum(map(len, request.options))
        case Generate():
            return _num_prompt_characters(request.prompt)


def _num_prompt_characters(prompt: Prompt) -> int:
    if isinstance(prompt, str):
        return len(prompt)
    return sum(len(message.content) for message in prompt)

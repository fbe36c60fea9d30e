"""The decode loop: generates token ids for chat, evaluation and rollouts.

Sampling noise depends only on a row's seed and the token's position, so a row gets the same
response in any batch and on any worker.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from medgpt.data.loader.packing import batches_by_length
from medgpt.models.inference_check import ReadingMode, find_mode
from medgpt.models.model_files import max_positions

VOCAB_BLOCK = 128  # tokens of the vocabulary whose probabilities are summed first
COMPACT_FRACTION = 0.875  # finished rows leave the batch when at most this share is unfinished


@dataclass(frozen=True, slots=True)
class GeneratedResponse:
    """The response to one prompt: at least one token, including the stop token if there is one."""

    ids: list[int]
    logprobs: list[float]  # in nats, of each id at the sampling temperature (greedy: 1)
    finished: bool  # ends with a stop token


@dataclass(frozen=True, slots=True)
class _DecodeStep:
    """One token of each row that is still in the batch; some of the rows may be finished."""

    rows: Tensor  # (b,) int64, indices of the batch's rows
    tokens: Tensor  # (b,) int64
    logprobs: Tensor  # (b,) float32


class TokenGenerator:
    """Generates responses with a causal model, in batches of prompts of similar length.

    Args:
        model: any Hugging Face causal model, in eval mode.
        batch_tokens: maximum number of tokens of a batch, counting prompts, padding and
            max_new_tokens (a single row may exceed it). Bounds the memory of the KV cache.
        mode: how rows are read; None: the fastest way that is exact.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        batch_tokens: int = 2**16,
        mode: ReadingMode | None = None,
    ) -> None:
        self.model: Any = model  # transformers does not type its models' forward
        self.batch_tokens = batch_tokens
        self.mode = mode or find_mode(model, ("batched", "single", "plain"), _greedy_rows)
        self.max_positions = max_positions(model.config) or 2**31

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        stop_token_ids: Sequence[int],
    ) -> list[GeneratedResponse]:
        """Return the response to each prompt.

        Args:
            seeds: one per prompt, in [0, 2**128).
            temperature: 0 always takes the most likely token.
            stop_token_ids: a row ends with the first of these ids.

        Raises:
            ValueError: a prompt is empty, or prompt and response exceed the model's positions.
        """
        self._check_lengths(prompts, max_new_tokens)
        responses: list[GeneratedResponse] = [GeneratedResponse([], [], False)] * len(prompts)
        lengths = [len(prompt) + max_new_tokens for prompt in prompts]
        batch_tokens = self.batch_tokens if self.mode == "batched" else 1
        for batch in batches_by_length(lengths, batch_tokens):
            shape, device = (len(batch), max_new_tokens), self.model.device
            tokens = torch.zeros(shape, dtype=torch.int64, device=device)
            logprobs = torch.zeros(shape, device=device)
            noise = uniform_noise([seeds[i] for i in batch], max_new_tokens)
            steps = self._steps([prompts[i] for i in batch], noise, temperature, stop_token_ids)
            for at, step in enumerate(steps):
                tokens[step.rows, at], logprobs[step.rows, at] = step.tokens, step.logprobs
            truncated = _truncate_at_stop(tokens, logprobs, stop_token_ids)
            for i, response in zip(batch, truncated, strict=True):
                responses[i] = response
        return responses

    def stream(
        self,
        prompt: Sequence[int],
        seed: int,
        *,
        max_new_tokens: int,
        temperature: float,
        stop_token_ids: Sequence[int],
    ) -> Iterator[int]:
        """Yield the ids of the response to one prompt as they are generated."""
        self._check_lengths([prompt], max_new_tokens)
        noise = uniform_noise([seed], max_new_tokens)
        for step in self._steps([prompt], noise, temperature, stop_token_ids):
            yield int(step.tokens)

    def _check_lengths(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        if not all(prompts) or max_new_tokens < 1:
            raise ValueError("generation needs non-empty prompts and max_new_tokens of at least 1")
        longest = max((len(prompt) for prompt in prompts), default=0) + max_new_tokens
        if longest > self.max_positions:
            raise ValueError(
                f"prompt and response need {longest} positions, the model has {self.max_positions}"
            )

    @torch.inference_mode()
    def _steps(
        self,
        prompts: Sequence[Sequence[int]],
        noise: Tensor,  # (B, T) in [0, 1)
        temperature: float,
        stop_token_ids: Sequence[int],
    ) -> Iterator[_DecodeStep]:
        """Yield one step at a time until all rows are finished, at most T."""
        device = self.model.device
        noise, stop_ids = noise.to(device), torch.tensor(stop_token_ids, device=device)
        rows = torch.arange(len(prompts), device=device)
        finished = torch.zeros_like(rows, dtype=torch.bool)
        state: Any = (
            _PlainState(self.model, prompts[0])
            if self.mode == "plain"
            else _DecodeState(self.model, prompts, noise.shape[1])
        )
        logits = state.read(state.prompt_ids)
        for at in range(noise.shape[1]):
            tokens, logprobs = sample_tokens(logits, noise[rows, at], temperature)
            yield _DecodeStep(rows, tokens, logprobs)
            finished |= torch.isin(tokens, stop_ids)
            num_unfinished = len(rows) - int(finished.sum())
            if not num_unfinished or at + 1 == noise.shape[1]:
                return
            if num_unfinished <= COMPACT_FRACTION * len(rows):
                unfinished = (~finished).nonzero()[:, 0]
                rows, tokens, finished = rows[unfinished], tokens[unfinished], finished[unfinished]
                state.select_rows(unfinished)
            logits = state.read(tokens)


class _DecodeState:
    """KV cache and attention mask of a batch of prompts, padded on the left."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self.model, device = model, model.device
        width = max(len(prompt) for prompt in prompts)
        padding = [width - len(prompt) for prompt in prompts]
        ids = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
        self.prompt_ids = torch.tensor(ids, device=device)  # (B, width)
        slots = torch.arange(width + max_new_tokens, device=device)
        self.padding = torch.tensor(padding, device=device)[:, None]  # (B, 1)
        # (B, slots); None without padding: attention has faster kernels then
        self.mask = (slots >= self.padding).long() if any(padding) else None
        self.length = 0
        self.cache = DynamicCache(config=model.config)
        self.cache.layers = [
            PreallocatedLayer(width + max_new_tokens) if type(layer) is DynamicLayer else layer
            for layer in self.cache.layers
        ]

    def read(self, ids: Tensor) -> Tensor:
        """Append `ids`, (b, L) or (b,), to the cache and return the logits (b, V) after them."""
        ids = ids.view(len(ids), -1)
        start, self.length = self.length, self.length + ids.shape[1]
        positions = torch.arange(start, self.length, device=ids.device) - self.padding
        output = self.model(
            input_ids=ids,
            attention_mask=None if self.mask is None else self.mask[:, : self.length],
            position_ids=positions.clamp(min=0),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def select_rows(self, rows: Tensor) -> None:
        """Keep only these rows (b,) of the batch."""
        layers: list[Any] = self.cache.layers
        indices: Any = rows
        for layer in layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):  # a state per row, no tokens
                layer.reorder_cache(indices)
            else:
                layer.batch_select_indices(rows)
        self.padding = self.padding[rows]
        if self.mask is not None:
            self.mask = self.mask[rows]


class _PlainState:
    """One row that is read anew for every token, for models whose cache changes the result."""

    def __init__(self, model: Any, prompt: Sequence[int]) -> None:
        self.model = model
        self.prompt_ids = torch.tensor([list(prompt)], device=model.device)
        self.ids = self.prompt_ids[:, :0]

    def read(self, ids: Tensor) -> Tensor:
        """Append `ids`, (1, L) or (1,), and return the logits (1, V) after them."""
        self.ids = torch.cat([self.ids, ids.view(1, -1)], 1)
        return self.model(input_ids=self.ids).logits[:, -1]


def _greedy_rows(
    model: PreTrainedModel, mode: ReadingMode, prompts: list[list[int]]
) -> list[tuple[list[int], list[float]]]:
    """Return ids and log-probabilities of greedy responses of which one ends before the other."""
    generator = TokenGenerator(model, mode=mode)
    options: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0.0}
    first = generator.generate(prompts, [0, 0], stop_token_ids=[], **options)
    second = generator.generate(prompts, [0, 0], stop_token_ids=first[0].ids[:1], **options)
    rows = zip([*prompts, *prompts], [*first, *second], strict=True)
    return [([*prompt, *row.ids], row.logprobs) for prompt, row in rows]


class PreallocatedLayer(DynamicLayer):
    """KV cache in preallocated buffers: a step writes one token and copies nothing.

    DynamicLayer copies all keys and values at every step.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.buffers: tuple[Tensor, Tensor] | None = None  # (B, heads, size, width) each

    def update(  # type: ignore[override]  # positional names
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values; return all of them, (B, heads, tokens so far, width) each."""
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        if self.buffers is None:
            self.lazy_initialization(key_states, value_states)
            both = key_states, value_states
            key_buffer, value_buffer = (
                x.new_empty(*x.shape[:2], self.size, x.shape[3]) for x in both
            )
            self.buffers = key_buffer, value_buffer
        key_buffer, value_buffer = self.buffers
        key_buffer[:, :, start:stop], value_buffer[:, :, start:stop] = key_states, value_states
        self.keys, self.values = key_buffer[:, :, :stop], value_buffer[:, :, :stop]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        assert self.buffers is not None, "the prompts have not been read yet"
        length = self.get_seq_length()
        key_buffer, value_buffer = (buffer[indices] for buffer in self.buffers)
        self.buffers = key_buffer, value_buffer
        self.keys, self.values = key_buffer[:, :, :length], value_buffer[:, :, :length]


def uniform_noise(seeds: Sequence[int], length: int) -> Tensor:
    """Return (B, T) float64 in [0, 1): column t of a row is a function of the row's seed and t.

    Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox). Uses raw words,
    which numpy guarantees not to change between versions.
    """
    words = np.stack([np.random.Philox(key=seed).random_raw(length) for seed in seeds])
    return torch.from_numpy((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def sample_tokens(logits: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw one token per row of `logits` (B, V) by inverse transform sampling.

    First picks a block of the vocabulary, then the token in it: all probabilities are summed once,
    and cumulative sums are computed over few numbers only.

    Args:
        noise: (B,) float64 in [0, 1), one number per token whatever the size of the vocabulary.

    Returns:
        Tokens (B,) int64 and their log-probabilities (B,) float32.
    """
    if not temperature:
        logprobs = logits.float().log_softmax(-1)
        best = logprobs.argmax(-1, keepdim=True)
        return best[:, 0], logprobs.gather(1, best)[:, 0]
    rows, size = logits.shape
    weights = logits.new_zeros(rows, -(-size // VOCAB_BLOCK) * VOCAB_BLOCK, dtype=torch.float32)
    scaled = torch.div(logits.float(), temperature, out=weights[:, :size])
    top = scaled.amax(-1, keepdim=True)
    scaled.sub_(top).exp_()
    blocks = weights.view(rows, -1, VOCAB_BLOCK)
    # float64: many unlikely tokens add up, and rounding must not draw a token of probability 0
    cumulated = blocks.sum(-1).cumsum(-1, dtype=torch.float64)  # (B, V / BLOCK)
    total = cumulated[:, -1:]
    block, before = _search_cumulative(cumulated, noise[:, None] * total)
    inside = blocks[torch.arange(rows, device=block.device), block[:, 0]]  # (B, BLOCK)
    inside = inside.cumsum(-1, dtype=torch.float64)
    token, _ = _search_cumulative(inside, noise[:, None] * total - before)
    tokens = block * VOCAB_BLOCK + token
    logprobs = logits.gather(1, tokens).float() / temperature - top - total.log().float()
    return tokens[:, 0], logprobs[:, 0]


def _search_cumulative(cumulated: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return where rows (B, K) first exceed `target` (B, 1), and the entry before; (B, 1) each."""
    # a rounded target may equal the total, which no entry exceeds
    target = target.minimum(torch.nextafter(cumulated[:, -1:], torch.zeros_like(target)))
    index = torch.searchsorted(cumulated, target, right=True)
    before = cumulated.gather(1, (index - 1).clamp(min=0))
    return index, torch.where(index > 0, before, 0.0)


def _truncate_at_stop(
    tokens: Tensor, logprobs: Tensor, stop_token_ids: Sequence[int]
) -> Iterator[GeneratedResponse]:
    """Cut rows (B, T) after their first stop token."""
    is_stop = torch.isin(tokens, torch.tensor(stop_token_ids, device=tokens.device))
    length = torch.where(is_stop.any(1), is_stop.int().argmax(1) + 1, tokens.shape[1])
    columns = (tokens, logprobs, length, is_stop.any(1))
    rows = zip(*(column.tolist() for column in columns), strict=True)
    for ids, row_logprobs, stop, finished in rows:
        yield GeneratedResponse(ids[:stop], row_logprobs[:stop], finished)

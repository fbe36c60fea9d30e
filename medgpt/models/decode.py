"""Token ids after token ids: the one generation engine, of chat, evaluation and rollouts.

Sampling noise is a function of a row's seed and the token's position alone, so a row says the same
in any batch, on any worker.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from medgpt.models.scoring import batches

BLOCK = 128  # tokens of the vocabulary that are added up first
COMPACT_SHARE = 0.875  # of a batch's rows; when no more are unfinished, the others are dropped


@dataclass(frozen=True, slots=True)
class Generated:
    """What follows a prompt: at least a token, the end token included where there is one."""

    ids: list[int]
    logprobs: list[float]  # natural, of each id, under the temperature that drew it (greedy: 1)
    finished: bool  # it ended by itself


@dataclass(frozen=True, slots=True)
class _Step:
    """One token of each row that is still in the batch, finished ones among them."""

    rows: Tensor  # (b,) int64, which of the batch's rows
    tokens: Tensor  # (b,) int64
    logprobs: Tensor  # (b,) float32


class Generator:
    """Generates with one causal model, in batches of prompts of similar length.

    Args:
        model: any Hugging Face causal model, in eval mode.
        batch_tokens: most tokens of a batch, prompts, padding and room for replies included (one
            row may have more): what bounds the memory of keys and values.
    """

    def __init__(self, model: PreTrainedModel, *, batch_tokens: int = 2**16) -> None:
        self.model: Any = model  # transformers does not type its models' forward
        self.batch_tokens = batch_tokens
        self.positions: int = (
            model.config.get_text_config().to_dict().get("max_position_embeddings") or 2**31
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        ends: Sequence[int],
    ) -> list[Generated]:
        """What the model says after each prompt.

        Args:
            seeds: one for each prompt, in [0, 2**128).
            temperature: 0 always takes the likeliest token.
            ends: ids that end a row.

        Raises:
            ValueError: a prompt is empty, or the model has too few positions for it and its reply.
        """
        self._check(prompts, max_new_tokens)
        found: list[Generated] = [Generated([], [], False)] * len(prompts)
        for batch in batches([len(p) + max_new_tokens for p in prompts], self.batch_tokens):
            shape, device = (len(batch), max_new_tokens), self.model.device
            tokens = torch.zeros(shape, dtype=torch.int64, device=device)
            logprobs = torch.zeros(shape, device=device)
            noise = uniforms([seeds[i] for i in batch], max_new_tokens)
            steps = self._steps([prompts[i] for i in batch], noise, temperature, ends)
            for at, step in enumerate(steps):
                tokens[step.rows, at], logprobs[step.rows, at] = step.tokens, step.logprobs
            for i, row in zip(batch, _cut(tokens, logprobs, ends), strict=True):
                found[i] = row
        return found

    def stream(
        self,
        prompt: Sequence[int],
        seed: int,
        *,
        max_new_tokens: int,
        temperature: float,
        ends: Sequence[int],
    ) -> Iterator[int]:
        """The same for one prompt, each id as soon as it is there."""
        self._check([prompt], max_new_tokens)
        noise = uniforms([seed], max_new_tokens)
        for step in self._steps([prompt], noise, temperature, ends):
            yield int(step.tokens)

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        if not all(prompts) or max_new_tokens < 1:
            raise ValueError("generation needs a token in each prompt and room for one more")
        longest = max((len(prompt) for prompt in prompts), default=0) + max_new_tokens
        if longest > self.positions:
            raise ValueError(f"{longest} tokens to hold, the model has {self.positions} positions")

    @torch.inference_mode()
    def _steps(
        self,
        prompts: Sequence[Sequence[int]],
        noise: Tensor,  # (B, T) in [0, 1)
        temperature: float,
        ends: Sequence[int],
    ) -> Iterator[_Step]:
        """Until all rows are finished, or T steps."""
        device = self.model.device
        noise, end_ids = noise.to(device), torch.tensor(ends, device=device)
        rows = torch.arange(len(prompts), device=device)
        finished = torch.zeros_like(rows, dtype=torch.bool)
        context = _Context(self.model, prompts, noise.shape[1])
        logits = context.read_prompts()
        for at in range(noise.shape[1]):
            tokens, logprobs = draw(logits, noise[rows, at], temperature)
            yield _Step(rows, tokens, logprobs)
            finished |= torch.isin(tokens, end_ids)
            left = len(rows) - int(finished.sum())
            if not left or at + 1 == noise.shape[1]:
                return
            if left <= COMPACT_SHARE * len(rows):
                kept = (~finished).nonzero()[:, 0]
                rows, tokens, finished = rows[kept], tokens[kept], finished[kept]
                context.keep(kept)
            logits = context.read(tokens)


class _Context:
    """What the model has read so far: keys and values of a batch padded on the left."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]], room: int) -> None:
        self.model, device = model, model.device
        width = max(len(prompt) for prompt in prompts)
        padding = [width - len(prompt) for prompt in prompts]
        ids = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
        self.ids = torch.tensor(ids, device=device)  # (B, width)
        slots = torch.arange(width + room, device=device)
        self.padding = torch.tensor(padding, device=device)[:, None]  # (B, 1)
        # (B, slots); none without padding: attention has faster ways then
        self.mask = (slots >= self.padding).long() if any(padding) else None
        self.length = 0
        self.cache = DynamicCache(config=model.config)
        self.cache.layers = [
            RoomyLayer(width + room) if type(layer) is DynamicLayer else layer
            for layer in self.cache.layers
        ]

    def read_prompts(self) -> Tensor:
        """(B, V) what each prompt's last token predicts."""
        return self.read(self.ids)

    def read(self, ids: Tensor) -> Tensor:
        """(b, V) what follows after `ids` (b, L) or (b,)."""
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

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these (b,)."""
        self.cache.batch_select_indices(rows)
        self.padding = self.padding[rows]
        if self.mask is not None:
            self.mask = self.mask[rows]


class RoomyLayer(DynamicLayer):
    """Keys and values in buffers with room for all tokens to come: a step writes one, copies none.

    DynamicLayer copies everything at every step.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.rooms: tuple[Tensor, Tensor] | None = None  # (B, heads, size, width) each

    def update(  # type: ignore[override]  # positional names
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """(B, heads, tokens until now, width) each."""
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        if self.rooms is None:
            self.lazy_initialization(key_states, value_states)
            both = (key_states, value_states)
            key_room, value_room = (x.new_empty(*x.shape[:2], self.size, x.shape[3]) for x in both)
            self.rooms = key_room, value_room
        key_room, value_room = self.rooms
        key_room[:, :, start:stop], value_room[:, :, start:stop] = key_states, value_states
        self.keys, self.values = key_room[:, :, :stop], value_room[:, :, :stop]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        assert self.rooms is not None, "there are rows after the prompts have been read"
        length = self.get_seq_length()
        key_room, value_room = (room[indices] for room in self.rooms)
        self.rooms = key_room, value_room
        self.keys, self.values = key_room[:, :, :length], value_room[:, :, :length]


def uniforms(seeds: Sequence[int], length: int) -> Tensor:
    """(B, T) float64 in [0, 1): token t of a row is a function of its seed and t.

    Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3" (Philox): raw words, whose
    values numpy promises to keep.
    """
    words = np.stack([np.random.Philox(key=seed).random_raw(length) for seed in seeds])
    return torch.from_numpy((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def draw(logits: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token of each row (B, V) and its log-probability, by the inverse of the distribution.

    Found in two steps, a block of the vocabulary and the token in it: one pass over all
    probabilities adds them up, cumulating is for few.

    Args:
        noise: (B,) float64 in [0, 1); one number a token, however large the vocabulary.

    Returns:
        (B,) int64 and (B,) float32.
    """
    if not temperature:
        logprobs = logits.float().log_softmax(-1)
        best = logprobs.argmax(-1, keepdim=True)
        return best[:, 0], logprobs.gather(1, best)[:, 0]
    rows, size = logits.shape
    weights = logits.new_zeros(rows, -(-size // BLOCK) * BLOCK, dtype=torch.float32)
    scaled = torch.div(logits.float(), temperature, out=weights[:, :size])
    top = scaled.amax(-1, keepdim=True)
    scaled.sub_(top).exp_()
    blocks = weights.view(rows, -1, BLOCK)
    # float64: many unlikely tokens add up, and none of probability 0 is drawn by rounding
    cumulated = blocks.sum(-1).cumsum(-1, dtype=torch.float64)  # (B, V / BLOCK)
    total = cumulated[:, -1:]
    block, before = _find(cumulated, noise[:, None] * total)
    inside = blocks[torch.arange(rows, device=block.device), block[:, 0]]  # (B, BLOCK)
    token, _ = _find(inside.cumsum(-1, dtype=torch.float64), noise[:, None] * total - before)
    tokens = block * BLOCK + token
    logprobs = logits.gather(1, tokens).float() / temperature - top - total.log().float()
    return tokens[:, 0], logprobs[:, 0]


def _find(cumulated: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1) where rows (B, K) first exceed `target` (B, 1), and how much they hold before."""
    # a rounded target may be the whole sum: not beyond what counts
    target = target.minimum(torch.nextafter(cumulated[:, -1:], torch.zeros_like(target)))
    found = torch.searchsorted(cumulated, target, right=True)
    before = cumulated.gather(1, (found - 1).clamp(min=0))
    return found, torch.where(found > 0, before, 0.0)


def _cut(tokens: Tensor, logprobs: Tensor, ends: Sequence[int]) -> Iterator[Generated]:
    """Rows (B, T) up to their first end."""
    is_end = torch.isin(tokens, torch.tensor(ends, device=tokens.device))
    length = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, tokens.shape[1])
    rows = zip(
        tokens.tolist(), logprobs.tolist(), length.tolist(), is_end.any(1).tolist(), strict=True
    )
    for ids, found, stop, finished in rows:
        yield Generated(ids[:stop], found[:stop], finished)

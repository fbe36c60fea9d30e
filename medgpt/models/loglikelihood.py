"""Log-likelihoods of answer options and texts under a causal model, for evaluation.

A prompt and its options form one row: prompt, option, option, ... Positions continue from the
prompt in each option, and under the mask an option attends to the prompt and itself only. The
prefix that all rows of a batch share, such as few-shot examples, is read once into a KV cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from medgpt.data.loader.packing import batches_by_length
from medgpt.models.inference_check import ReadingMode, find_mode, plain_logprobs
from medgpt.models.language_model import logits_of
from medgpt.models.model_files import max_positions
from medgpt.models.tokenizer import common_prefix_length

MIN_SHARED_TOKENS = 8  # a shorter shared prefix is not worth a forward of its own
HEAD_CHUNK_POSITIONS = 512  # maximum number of positions per call of the output layer
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}


@dataclass(frozen=True, slots=True)
class PromptOptions:
    """Token ids of a prompt and its options; none of them is empty."""

    prompt: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Tokens of the row: the last token of an option is predicted, but not an input."""
        return len(self.prompt) + sum(len(option) - 1 for option in self.options)


class LoglikelihoodScorer:
    """Computes log-probabilities of options and texts under one causal model."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        batch_tokens: int,
        window_tokens: int,
        mode: ReadingMode | None = None,
    ) -> None:
        """Check which attention masks the model supports.

        Args:
            batch_tokens: maximum number of tokens of a forward, padding included (a single row may
                exceed it).
            window_tokens: longer texts are scored in windows of this many tokens.
            mode: how rows are read; None: the fastest way that is exact.
        """
        mode = mode or find_mode(model, ("batched", "plain"), _scored_rows)
        self.model = model
        self.batch_tokens = batch_tokens
        self.max_positions = max_positions(model.config) or 2**31
        self.window_tokens = min(window_tokens, self.max_positions)
        self.body_output: type = BaseModelOutput  # of the latest forward
        self.is_plain = mode == "plain"
        # a custom mask replaces the model's own, and with it the window of the layers that have one
        has_windows = any(DynamicCache(config=model.config).is_sliding)
        self.can_pack_options = not (self.is_plain or has_windows) and self._supports_custom_masks()

    # ---- options ----

    def option_logprobs(self, items: Sequence[PromptOptions]) -> list[list[float]]:
        """Return log p(option | prompt) in nats of each option, summed over its tokens.

        Raises:
            ValueError: a prompt or option is empty, or too long for the model's positions.
        """
        for item in items:
            self._check_lengths(item)
        logprobs: list[list[float]] = [[] for _ in items]
        for batch in batches_by_length([item.length for item in items], self.batch_tokens):
            score = self._score_packed if self.can_pack_options else self._score_one_by_one
            for i, scores in zip(batch, score([items[i] for i in batch]), strict=True):
                logprobs[i] = scores
        return logprobs

    def _check_lengths(self, item: PromptOptions) -> None:
        if not item.prompt or not item.options or not all(item.options):
            raise ValueError("the prompt is empty, there are no options, or an option is empty")
        longest = len(item.prompt) + max(len(option) for option in item.options) - 1
        if longest > self.max_positions:
            raise ValueError(
                f"prompt and option have {longest} tokens, the model {self.max_positions} positions"
            )

    @torch.inference_mode()
    def _score_packed(self, items: Sequence[PromptOptions]) -> list[list[float]]:
        prompts = [item.prompt for item in items]
        shared = min(common_prefix_length(prompts), *(len(prompt) - 1 for prompt in prompts))
        size = shared if shared >= MIN_SHARED_TOKENS and len(items) > 1 else 0
        cache = self._prefill(items[0].prompt[:size]) if size else None
        rows = [_PackedOptions(item, size) for item in items]
        width = max(len(row.ids) for row in rows)
        ids = _pad_right([row.ids for row in rows], width)
        positions = _pad_right([row.positions for row in rows], width)
        branches = any(len(option) > 1 for item in items for option in item.options)
        mask = torch.stack([row.mask(width) for row in rows])[:, None] if branches or size else None
        hidden = self._hidden_states(ids, positions=positions, mask=mask, cache=cache)
        targets = [(i, at, token) for i, row in enumerate(rows) for at, token in row.targets()]
        logprobs = iter(self._logprobs(hidden, targets))
        return [[sum(next(logprobs) for _ in option) for option in item.options] for item in items]

    @torch.inference_mode()
    def _score_one_by_one(self, items: Sequence[PromptOptions]) -> list[list[float]]:
        """Score each option in a forward of its own, for models with only the causal mask."""
        return [
            [
                sum(self._logprobs_from([(*item.prompt, *option)], [len(item.prompt)])[0])
                for option in item.options
            ]
            for item in items
        ]

    def _supports_custom_masks(self) -> bool:
        """Return whether packed options get the same scores as options in rows of their own."""
        prompt, options = (5, 7, 5, 9, 11, 6), ((8, 5, 6, 7), (6, 9, 9, 5), (9, 8))
        prompts = (prompt, (*prompt[:3], 4, *prompt[4:]))
        items = [PromptOptions(prompt, options) for prompt in prompts]
        one_by_one = torch.tensor(self._score_one_by_one(items))
        try:
            packed = torch.tensor(self._score_packed(items))
        except (ValueError, TypeError, RuntimeError):  # the forward does not take these arguments
            return False
        tolerance = PROBE_TOLERANCE[self.model.dtype]
        return torch.allclose(packed, one_by_one, rtol=0, atol=tolerance)

    # ---- texts ----

    def rolling_logprobs(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return log p of every token of each text but the first, in nats.

        A text longer than the window is scored in windows that each start half a window after the
        previous one. A token counts in the first window that holds it, so it counts once, and after
        the first window it has at least half a window of context.
        """
        windows = [
            (i, start, stop, new)
            for i, text in enumerate(texts)
            for start, stop, new in sliding_windows(len(text), self.window_tokens)
        ]
        logprobs_by_text: list[list[float]] = [[0.0] * max(len(text) - 1, 0) for text in texts]
        sizes = [stop - start for _, start, stop, _ in windows]
        for batch in batches_by_length(sizes, self.batch_tokens):
            cut = [windows[k] for k in batch]
            rows = [texts[i][start:stop] for i, start, stop, _ in cut]
            firsts = [new - start for _, start, _, new in cut]
            logprobs = self._logprobs_from(rows, firsts)
            for (i, _, stop, new), row_logprobs in zip(cut, logprobs, strict=True):
                logprobs_by_text[i][new - 1 : stop - 1] = row_logprobs
        return logprobs_by_text

    @torch.inference_mode()
    def _logprobs_from(
        self, rows: Sequence[Sequence[int]], firsts: Sequence[int]
    ) -> list[list[float]]:
        """Return the log-probabilities of each row's tokens from index `firsts` >= 1 on."""
        if self.is_plain:
            pairs = zip(rows, firsts, strict=True)
            return [
                plain_logprobs(self.model, list(row))[first - 1 :].tolist() for row, first in pairs
            ]
        width = max(len(row) for row in rows)
        ids = _pad_right(rows, width)  # attention is causal: no token attends to the padding
        hidden = self._hidden_states(ids[:, :-1])
        spans = list(zip(rows, firsts, strict=True))
        targets = [
            (i, at - 1, row[at])
            for i, (row, first) in enumerate(spans)
            for at in range(first, len(row))
        ]
        logprobs = iter(self._logprobs(hidden, targets))
        return [[next(logprobs) for _ in range(first, len(row))] for row, first in spans]

    # ---- the model ----

    def _prefill(self, ids: Sequence[int]) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        self.model.base_model(
            input_ids=torch.tensor([ids], device=self.model.device),
            past_key_values=cache,
            use_cache=True,
        )
        return cache

    def _hidden_states(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: DynamicCache | None = None,
    ) -> Tensor:
        """Return last hidden states (B, L, H)."""
        device, inputs = self.model.device, {"input_ids": ids.to(self.model.device)}
        if positions is not None:
            inputs["position_ids"] = positions.to(device)
        if mask is not None:
            inputs["attention_mask"] = _additive_mask(mask, self.model.dtype).to(device)
        if cache is not None:
            cache.batch_repeat_interleave(len(ids))
        options: dict[str, Any] = {"past_key_values": cache, "use_cache": cache is not None}
        output = self.model.base_model(**inputs, **options)
        self.body_output = type(output)
        return output.last_hidden_state

    def _logprobs(self, hidden: Tensor, targets: Sequence[tuple[int, int, int]]) -> list[float]:
        """Return log p(token) of each target (row, position, token), in nats.

        The logits of a position are computed once, however many targets it has.
        """
        places = list(dict.fromkeys((row, at) for row, at, _ in targets))
        index = {place: i for i, place in enumerate(places)}
        place_of_target = torch.tensor([index[row, at] for row, at, _ in targets])
        tokens = torch.tensor([token for _, _, token in targets])
        rows, ats = torch.tensor(places, device=hidden.device).unbind(1)
        logprobs = torch.empty(len(targets))
        for start in range(0, len(places), HEAD_CHUNK_POSITIONS):
            stop = start + HEAD_CHUNK_POSITIONS
            chosen = hidden[rows[start:stop], ats[start:stop]]
            logits = logits_of(self.model, chosen, self.body_output).float()
            norms = logits.logsumexp(-1)
            is_in_chunk = (place_of_target >= start) & (place_of_target < stop)
            in_chunk = is_in_chunk.nonzero()[:, 0]
            at = (place_of_target[in_chunk] - start).to(logits.device)
            logprobs[in_chunk] = (logits[at, tokens[in_chunk].to(logits.device)] - norms[at]).cpu()
        return logprobs.tolist()


def _scored_rows(
    model: PreTrainedModel, mode: ReadingMode, prompts: list[list[int]]
) -> list[tuple[list[int], list[float]]]:
    """Return the prompts and the log-probabilities of all their tokens but the first."""
    scorer = LoglikelihoodScorer(model, batch_tokens=2**10, window_tokens=2**10, mode=mode)
    return list(zip(prompts, scorer.rolling_logprobs(prompts), strict=True))


class _PackedOptions:
    """A prompt and its options as one row, without the first `size` tokens, which are cached."""

    def __init__(self, item: PromptOptions, size: int) -> None:
        self.item, self.num_cached = item, size
        self.num_prompt_tokens = len(item.prompt) - size
        bodies = [option[:-1] for option in item.options]
        self.starts = [self.num_prompt_tokens]
        for body in bodies:
            self.starts.append(self.starts[-1] + len(body))
        self.ids = [*item.prompt[size:], *(token for body in bodies for token in body)]
        end = len(item.prompt)
        self.positions = [
            *range(size, end),
            *(end + i for body in bodies for i in range(len(body))),
        ]

    def mask(self, width: int) -> Tensor:
        """Return (width, size + width) bool: True where a position may attend.

        Padding attends to the first token only.
        """
        seen = torch.ones(width, width, dtype=torch.bool).tril()
        for start, stop in zip(self.starts, self.starts[1:], strict=False):
            seen[start:stop, self.num_prompt_tokens : start] = False
        seen[len(self.ids) :] = False
        seen[len(self.ids) :, 0] = True
        return torch.cat([torch.ones(width, self.num_cached, dtype=torch.bool), seen], 1)

    def targets(self) -> Iterator[tuple[int, int]]:
        """Yield (position that predicts the token, token) for every token of every option."""
        for option, start in zip(self.item.options, self.starts, strict=False):
            for i, token in enumerate(option):
                yield (start + i - 1 if i else self.num_prompt_tokens - 1), token


def sliding_windows(length: int, window: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, first new token) of the windows of a text of `length` tokens."""
    new, start = 1, 0
    while new < length:
        stop = min(start + window, length)
        yield start, stop, new
        new, start = stop, start + window // 2


def _pad_right(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    """Return the rows as (B, width), padded on the right with 0."""
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


def _additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask as a float tensor that is added to the attention scores."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

"""Language-model objectives: next-token and masked-token prediction.

Shapes: B sequences, L tokens, V vocabulary.
"""

import torch
from torch import Tensor

from medgpt.algos.logprobs import IGNORE, label_logprobs


def causal_lm_loss(
    logits: Tensor, labels: Tensor, *, num_tokens: Tensor | int, overwrite: bool = False
) -> Tensor:
    """Return () float32: cross-entropy in nats, summed over the labels, divided by `num_tokens`.

    With `num_tokens` counted over the global batch, the shards' results add up to that of the whole
    batch. Labels are not shifted, so this is also the loss of masked language models.

    Args:
        logits: (..., V); may hold anything, even nan, where the label is IGNORE.
        labels: (...) int64, aligned with the logits; IGNORE (-100) = no loss.
        num_tokens: labels other than IGNORE in the global batch.
        overwrite: the logits are not read afterwards, see `label_logprobs`.
    """
    return -label_logprobs(logits, labels, overwrite=overwrite).sum() / num_tokens


def mask_tokens(
    input_ids: Tensor,
    special_mask: Tensor,
    *,
    mask_id: int,
    vocab_size: int,
    mlm_probability: float,
    generator: torch.Generator,
    word_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return corrupted input_ids (B, L) and labels (B, L) of BERT's masked-language objective.

    Devlin et al., 2018, https://arxiv.org/abs/1810.04805, section 3.1; whole words as in
    Cui et al., 2019, https://arxiv.org/abs/1906.08101.

    Args:
        input_ids: (B, L) int64, not modified.
        special_mask: (B, L) bool, True on tokens that are never picked, such as [CLS] and padding.
        mask_id: replaces 80 % of the picked tokens.
        vocab_size: 10 % of the picked tokens become a random id below it, 10 % stay.
        mlm_probability: probability that a token, or a word, is picked.
        generator: on the device of input_ids; the only source of randomness.
        word_ids: (B, L) int64, tokens of a row with the same number are picked together; -1 marks
            tokens outside words, each picked on its own.
    """
    shape, device = input_ids.shape, input_ids.device
    chance = _unit_draws(shape, word_ids, generator, device)
    picked = (chance < mlm_probability) & ~special_mask

    action = torch.rand(shape, generator=generator, device=device)
    random_ids = torch.randint(vocab_size, shape, generator=generator, device=device)
    corrupted = torch.where(picked & (action < 0.8), mask_id, input_ids)
    corrupted = torch.where(picked & (action >= 0.8) & (action < 0.9), random_ids, corrupted)
    return corrupted, torch.where(picked, input_ids, IGNORE)


def _unit_draws(
    shape: torch.Size, word_ids: Tensor | None, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Return (B, L) uniform draws in [0, 1), the same for all tokens of a word."""
    if word_ids is None:
        return torch.rand(shape, generator=generator, device=device)
    rows = torch.arange(shape[0], device=device)[:, None]
    outside_words = -1 - torch.arange(shape.numel(), device=device).view(shape)
    units = torch.where(word_ids < 0, outside_words, rows * (word_ids.max() + 1) + word_ids)
    distinct, inverse = units.unique(return_inverse=True)
    return torch.rand(len(distinct), generator=generator, device=device)[inverse]

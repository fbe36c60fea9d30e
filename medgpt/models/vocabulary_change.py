"""What another vocabulary does to a base model before any training.

The logits of the tokens that stay are unchanged, but the softmax is taken over more (or fewer)
tokens, so the loss moves although nothing was learnt or forgotten.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from medgpt.data.loader.batch import IGNORE, PackedBatch
from medgpt.models.language_model import LanguageModel
from medgpt.models.vocabulary import VocabularyReport, resize_for_new_tokens

PIECE_TOKENS = 128  # of each text


@dataclass(frozen=True, slots=True, kw_only=True)
class LossShift:
    """Mean loss of the same texts in the base's tokens, in nats per predicted token."""

    before: float
    after: float
    num_targets: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyChange:
    """The new vocabulary, and the loss before and after if it was measured."""

    vocabulary: VocabularyReport
    loss: LossShift | None

    def facts(self) -> dict[str, Any]:
        """For a manifest."""
        return asdict(self.vocabulary) | ({"loss": asdict(self.loss)} if self.loss else {})

    def __str__(self) -> str:
        vocabulary, loss = self.vocabulary, self.loss
        text = f"vocabulary of {vocabulary.num_tokens:,} tokens, {vocabulary.num_new_tokens:,} new"
        if vocabulary.num_new_tokens:
            text += f", each for {vocabulary.mean_old_tokens:.1f} old ones"
        if loss is not None:
            text += (
                f"; before training the loss on old tokens is {loss.after:.4f} nats, "
                f"{loss.after - loss.before:+.4f} by the other softmax"
            )
        return text


def change_vocabulary(
    model: PreTrainedModel,
    base: PreTrainedTokenizerFast,
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str] = (),
) -> VocabularyChange:
    """Give `model`, which speaks `base`, the vocabulary of `tokenizer`, in place.

    Args:
        texts: a few, on which a causal model's loss is measured. Those with tokens that are gone
            are left out.
    """
    old, now = base.get_vocab(), tokenizer.get_vocab()
    new_id = {old[token]: i for token, i in now.items() if token in old}
    encoded = [base(text, add_special_tokens=False)["input_ids"] for text in texts]
    pieces = [ids[:PIECE_TOKENS] for ids in encoded]
    pieces = [ids for ids in pieces if len(ids) > 1 and new_id.keys() >= set(ids)]
    before = _mean_loss(model, pieces) if pieces else 0.0
    report = resize_for_new_tokens(model, base, tokenizer)
    if not pieces:
        return VocabularyChange(vocabulary=report, loss=None)
    after = _mean_loss(model, [[new_id[i] for i in ids] for ids in pieces])
    num_targets = sum(len(ids) - 1 for ids in pieces)
    loss = LossShift(before=before, after=after, num_targets=num_targets)
    return VocabularyChange(vocabulary=report, loss=loss)


@torch.no_grad()
def _mean_loss(model: PreTrainedModel, pieces: list[list[int]]) -> float:
    """Every token but a piece's first is predicted."""
    batch = _batch(pieces).to(model.device)
    return float(LanguageModel(model)(batch, num_tokens=batch.num_targets))


def _batch(pieces: list[list[int]]) -> PackedBatch:
    lengths = [len(ids) for ids in pieces]
    labels = [label for ids in pieces for label in (*ids[1:], IGNORE)]
    return PackedBatch(
        input_ids=torch.tensor([[i for ids in pieces for i in ids]]),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        labels=torch.tensor([labels]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        max_seqlen=max(lengths),
    )

"""Measure how a new vocabulary changes the loss of a base model before any training.

The logits of the tokens that stay are unchanged, but the softmax is over more (or fewer) tokens, so
the loss changes although the model has not learned or forgotten anything.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from medgpt.data.loader.batch import IGNORE, PackedBatch
from medgpt.models.language_model import LanguageModel
from medgpt.models.vocabulary import VocabularyReport, replace_vocabulary

MAX_TEXT_TOKENS = 128  # tokens of each text that are scored


@dataclass(frozen=True, slots=True, kw_only=True)
class LossShift:
    """Mean loss on the same texts before and after the change, in nats per predicted token."""

    before: float
    after: float
    num_targets: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyChange:
    """The new vocabulary, and the change of the loss if it was measured."""

    vocabulary: VocabularyReport
    loss: LossShift | None

    def manifest_entry(self) -> dict[str, Any]:
        """Return the facts as a dict for a manifest."""
        return asdict(self.vocabulary) | ({"loss": asdict(self.loss)} if self.loss else {})

    def __str__(self) -> str:
        vocabulary, loss = self.vocabulary, self.loss
        text = f"vocabulary of {vocabulary.num_tokens:,} tokens, {vocabulary.num_new_tokens:,} new"
        if vocabulary.num_new_tokens:
            text += f", each replacing {vocabulary.mean_old_tokens:.1f} old tokens"
        if loss is not None:
            text += (
                f"; before training the loss on old tokens is {loss.after:.4f} nats "
                f"({loss.after - loss.before:+.4f} from the changed softmax)"
            )
        return text


def change_vocabulary(
    model: PreTrainedModel,
    base: PreTrainedTokenizerFast,
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str] = (),
) -> VocabularyChange:
    """Change the vocabulary of `model` from `base` to `tokenizer`, in place.

    Args:
        texts: a few texts to measure the loss of a causal model on. Texts with removed tokens are
            skipped.
    """
    base_vocabulary, vocabulary = base.get_vocab(), tokenizer.get_vocab()
    new_id = {
        base_vocabulary[token]: i for token, i in vocabulary.items() if token in base_vocabulary
    }
    encoded = [base(text, add_special_tokens=False)["input_ids"] for text in texts]
    sequences = [ids[:MAX_TEXT_TOKENS] for ids in encoded]
    sequences = [ids for ids in sequences if len(ids) > 1 and new_id.keys() >= set(ids)]
    before = _mean_loss(model, sequences) if sequences else 0.0
    report = replace_vocabulary(model, base, tokenizer)
    if not sequences:
        return VocabularyChange(vocabulary=report, loss=None)
    after = _mean_loss(model, [[new_id[i] for i in ids] for ids in sequences])
    num_targets = sum(len(ids) - 1 for ids in sequences)
    loss = LossShift(before=before, after=after, num_targets=num_targets)
    return VocabularyChange(vocabulary=report, loss=loss)


@torch.no_grad()
def _mean_loss(model: PreTrainedModel, sequences: list[list[int]]) -> float:
    """Return the mean loss in nats; every token but the first of a sequence is predicted."""
    batch = _pack(sequences).to(model.device)
    return float(LanguageModel(model)(batch, num_tokens=batch.num_targets))


def _pack(sequences: list[list[int]]) -> PackedBatch:
    lengths = [len(ids) for ids in sequences]
    labels = [label for ids in sequences for label in (*ids[1:], IGNORE)]
    return PackedBatch(
        input_ids=torch.tensor([[i for ids in sequences for i in ids]]),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        labels=torch.tensor([labels]),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        max_seqlen=max(lengths),
    )

"""Change the vocabulary of a model, and measure how that changes its loss before any training.

The logits of the tokens that stay are unchanged, but the softmax is over more (or fewer) tokens, so
the loss changes although the model has not learned or forgotten anything.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from medgpt.data.loader.batch import IGNORE, PackedBatch
from medgpt.models.language_model import LanguageModel

_SPECIAL_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
MAX_TEXT_TOKENS = 128  # tokens of each text that are scored


@dataclass(frozen=True, slots=True, kw_only=True)
class LossShift:
    """Mean loss on the same texts before and after the change, in nats per predicted token."""

    before: float
    after: float
    num_targets: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyChange:
    """Size of the new vocabulary, and the change of the loss if it was measured."""

    num_tokens: int
    num_new_tokens: int
    mean_old_tokens: float  # old tokens per new token
    loss: LossShift | None = None

    def manifest_entry(self) -> dict[str, Any]:
        """Return the facts as a dict for a manifest."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        text = f"vocabulary of {self.num_tokens:,} tokens, {self.num_new_tokens:,} new"
        if self.num_new_tokens:
            text += f", each replacing {self.mean_old_tokens:.1f} old tokens"
        if self.loss is not None:
            text += (
                f"; before training the loss on old tokens is {self.loss.after:.4f} nats "
                f"({self.loss.after - self.loss.before:+.4f} from the changed softmax)"
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
    new_id = _new_id_of_old(base, tokenizer)
    encoded = [base(text, add_special_tokens=False)["input_ids"] for text in texts]
    sequences = [ids[:MAX_TEXT_TOKENS] for ids in encoded]
    sequences = [ids for ids in sequences if len(ids) > 1 and new_id.keys() >= set(ids)]
    before = _mean_loss(model, sequences) if sequences else 0.0
    change = replace_vocabulary(model, base, tokenizer)
    if not sequences:
        return change
    after = _mean_loss(model, [[new_id[i] for i in ids] for ids in sequences])
    num_targets = sum(len(ids) - 1 for ids in sequences)
    loss = LossShift(before=before, after=after, num_targets=num_targets)
    return replace(change, loss=loss)


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


def replace_vocabulary(
    model: PreTrainedModel,
    base_tokenizer: PreTrainedTokenizerFast,
    tokenizer: PreTrainedTokenizerFast,
) -> VocabularyChange:
    """Change the vocabulary of `model` from `base_tokenizer` to `tokenizer`, in place.

    An old token keeps its rows of the input and output embedding; a new token gets the mean of the
    rows of the old tokens that spell it. Tied embeddings stay tied.
    """
    rows = _old_ids_of_tokens(base_tokenizer, tokenizer)
    vocabulary = tokenizer.get_vocab()
    new_id = _new_id_of_old(base_tokenizer, tokenizer)
    if all(before == after for before, after in new_id.items()):  # none trimmed: padding rows stay
        rows += [[i] for i in range(len(rows), _input_embedding(model).num_embeddings)]
        new_id = {}
    _replace_rows(model, rows)
    if new_id:
        _renumber_config(model, new_id)
    new_tokens = vocabulary.keys() - base_tokenizer.get_vocab().keys()
    num_old_tokens = [len(rows[vocabulary[token]]) for token in new_tokens]
    return VocabularyChange(
        num_tokens=len(vocabulary),
        num_new_tokens=len(num_old_tokens),
        mean_old_tokens=sum(num_old_tokens) / len(num_old_tokens) if num_old_tokens else 0.0,
    )


def _new_id_of_old(
    base: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast
) -> dict[int, int]:
    """Map the id in `base` of each token that stays to its new id."""
    old = base.get_vocab()
    return {old[token]: i for token, i in tokenizer.get_vocab().items() if token in old}


def _old_ids_of_tokens(
    base: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast
) -> list[list[int]]:
    """Return for every id of `tokenizer` the ids of `base` that spell its token."""
    vocabulary, added = base.get_vocab(), tokenizer.added_tokens_encoder
    spell = base.backend_tokenizer.model.tokenize
    rows: list[list[int]] = [[] for _ in range(max(tokenizer.get_vocab().values()) + 1)]
    for token, i in tokenizer.get_vocab().items():
        if token in vocabulary:
            rows[i] = [vocabulary[token]]
        elif token in added:
            rows[i] = base(token, add_special_tokens=False)["input_ids"]
        else:
            rows[i] = [old_token.id for old_token in spell(token)]
    return [old or [i] for i, old in enumerate(rows)]  # an id without a token keeps its row


def _replace_rows(model: PreTrainedModel, rows: list[list[int]]) -> None:
    """Set row i of the input and output embedding to the mean of the old rows `rows[i]`."""
    inputs, outputs = _input_embedding(model), model.get_output_embeddings()
    tied = outputs is not None and outputs.weight is inputs.weight
    inputs.weight = _average_rows(inputs.weight, rows)
    inputs.num_embeddings = len(rows)
    if inputs.padding_idx is not None:
        inputs.padding_idx = rows.index([inputs.padding_idx])
    if outputs is not None:
        outputs.weight = inputs.weight if tied else _average_rows(outputs.weight, rows)
        outputs.out_features = len(rows)
        if outputs.bias is not None:
            outputs.bias = _average_rows(outputs.bias, rows)
    model.config.get_text_config().vocab_size = len(rows)
    model.resize_token_embeddings(len(rows))  # updates everything else that stores the size


def _input_embedding(model: PreTrainedModel) -> nn.Embedding:
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    return embedding


def _average_rows(weight: Tensor, rows: list[list[int]]) -> nn.Parameter:
    """Return (len(rows), ...) with the means of rows of `weight` (V, ...)."""
    mean = weight.detach()[[old[0] for old in rows]]
    for i, old in enumerate(rows):
        if len(old) > 1:
            mean[i] = weight.detach()[old].float().mean(0)
    return nn.Parameter(mean, requires_grad=weight.requires_grad)


def _renumber_config(model: PreTrainedModel, new_id: dict[int, int]) -> None:
    configs: list[PreTrainedConfig | GenerationConfig] = [model.config]
    if model.can_generate():
        configs.append(model.generation_config)
    for config in configs:
        for key in _SPECIAL_ID_KEYS:
            old = getattr(config, key)
            if isinstance(old, list):
                setattr(config, key, [new_id[i] for i in old if i in new_id])
            elif old is not None:
                setattr(config, key, new_id.get(old))

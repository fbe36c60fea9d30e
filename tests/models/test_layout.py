"""The loss of any model is that of plain transformers on each text alone, or the model is refused.

The sweep over all types of transformers is slow; one of each kind of difference runs always.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from medgpt.config.base import ConfigError, ModelError
from medgpt.data.loader.batch import IGNORE
from medgpt.data.loader.collate import packed_batch
from medgpt.models.attention import VARLEN
from medgpt.models.language_model import LanguageModel
from medgpt.models.layout import is_packed, random_texts
from medgpt.models.model_files import HeadKind
from medgpt.models.small_model import copy_of, small_model
from medgpt.models.training_mode import prepare_for_training

CAUSAL = sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MASKED = sorted(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)


class Kind(NamedTuple):
    """A model type that differs from Llama in its own way."""

    model_type: str
    head_kind: HeadKind
    packs: bool
    why: str


KINDS = [
    Kind("llama", "clm", True, "nothing"),
    Kind("roberta", "mlm", False, "positions begin at padding_idx + 1"),
    Kind("bloom", "clm", False, "alibi ignores cu_seqlens"),
    Kind("mpt", "clm", False, "its forward fails on packed rows"),
    Kind("mamba", "clm", False, "state crosses texts"),
    Kind("jamba", "clm", False, "state crosses texts in some layers"),
    Kind("minicpm3", "clm", True, "a property scales the logits"),
    Kind("opt", "clm", True, "functional dropout"),
    Kind("biogpt", "clm", True, "functional dropout"),
    Kind("gpt_bigcode", "clm", True, "functional dropout"),
    Kind("seed_oss", "clm", True, "functional dropout"),
    Kind("falcon", "clm", False, "it knows no attention but its own"),
    Kind("stablelm", "clm", False, "it does not pass cu_seqlens on"),
    Kind("deberta-v2", "mlm", False, "relative positions over the whole row"),
    Kind("electra", "mlm", True, "two output layers"),
]


def plain_config(model_type: str, head_kind: HeadKind) -> PreTrainedConfig:
    config = CONFIG_MAPPING[model_type]()
    if model_type == "opt":
        config.dropout = 0.3
    if head_kind == "value":
        config.num_labels = 1
    return config


def plain_loss(model: PreTrainedModel, head_kind: HeadKind, texts: list[Tensor]) -> Tensor:
    """Return the mean loss () of plain transformers, one text at a time."""
    losses = []
    for text in texts:
        logits = model(text[None]).logits[0].float()
        labels = text if head_kind == "mlm" else torch.cat([text[1:], torch.tensor([IGNORE])])
        losses.append(F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE))
    return torch.stack(losses).sum()


def training_loss(model: LanguageModel, head_kind: HeadKind, texts: list[Tensor]) -> Tensor:
    ends = [text if head_kind == "mlm" else text.roll(-1) for text in texts]
    if head_kind != "mlm":
        for labels in ends:
            labels[-1] = IGNORE
    lengths = np.array([len(text) for text in texts])
    return model(packed_batch(torch.cat(texts), torch.cat(ends), lengths), num_tokens=1)


def assert_exact_or_refused(model_type: str, head_kind: HeadKind) -> bool:
    """Return whether the model packs; ConfigError if it is refused."""
    config = plain_config(model_type, head_kind)
    packs = is_packed(config, head_kind, "auto", name=model_type)
    texts = random_texts(config)
    plain = small_model(config, head_kind, texts[-1][None])
    with torch.no_grad():
        for weight in plain.parameters():  # other weights than those of the check
            weight.mul_(1.1)
    options = {"attn_implementation": VARLEN if packs else None}
    ours = prepare_for_training(copy_of(plain, head_kind, **options), None)
    three = [texts[1], texts[0][:5], texts[0]]
    with torch.no_grad():
        expected = plain_loss(plain, head_kind, three)
    for model in (LanguageModel(ours), LanguageModel(ours, loss_chunk_tokens=4)):
        for _ in range(2):  # noise would differ
            loss = training_loss(model, head_kind, three)
            assert loss.item() == pytest.approx(expected.item(), rel=2e-4 / 8)
    return packs


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.model_type)
def test_each_kind_of_difference_is_found_and_mended(kind: Kind) -> None:
    assert assert_exact_or_refused(kind.model_type, kind.head_kind) == kind.packs


def test_packing_on_refuses_what_off_and_auto_pad() -> None:
    config = plain_config("bloom", "clm")
    assert not is_packed(config, "clm", "off", name="bloom")
    with pytest.raises(ConfigError, match=r"model.name=bloom: packed rows are not exact.*auto"):
        is_packed(config, "clm", "on", name="bloom")
    assert is_packed(plain_config("llama", "clm"), "clm", "on", name="llama")
    assert not is_packed(plain_config("llama", "clm"), "clm", "off", name="llama")


def test_a_model_that_is_exact_in_neither_way_is_refused_with_reasons() -> None:
    with pytest.raises(ModelError, match=r"does not compute fnet as transformers does.*differ by"):
        is_packed(plain_config("fnet", "mlm"), "mlm", "auto", name="google/fnet-base")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_kind", "model_type"),
    [*(("clm", name) for name in CAUSAL), *(("mlm", name) for name in MASKED)],
)
def test_every_type_of_transformers_is_exact_or_refused(
    head_kind: HeadKind, model_type: str
) -> None:
    try:
        assert_exact_or_refused(model_type, head_kind)
    except ModelError as refusal:
        assert model_type in str(refusal)  # noqa: PT017 - both ends are fine


def test_a_check_draws_nothing_from_the_generator_of_the_caller() -> None:
    hf_config = CONFIG_MAPPING["qwen2"](hidden_size=32, num_attention_heads=2, vocab_size=99)
    before = torch.get_rng_state()
    assert is_packed(hf_config, "clm", "auto", name="m")
    assert torch.equal(torch.get_rng_state(), before)

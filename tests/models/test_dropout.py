"""LoRA's dropout masks depend on the sample, not on where it is packed."""

import pytest
import torch
from torch import Tensor

from medgpt.config.model import LoraConfig
from medgpt.models.language_model import LanguageModel
from medgpt.models.lora import apply_lora
from medgpt.models.packed import SequenceDropout
from tests.models.tiny_models import VOCAB, pack, tiny_model


def adapted(**options) -> LanguageModel:
    """Return a model whose adapters are not zero, so that dropout has an effect."""
    model = apply_lora(tiny_model(), LoraConfig(rank=2, alpha=8, dropout=0.5))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    return LanguageModel(model, **options)


def two_sequences() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randint(3, VOCAB, (6,), generator=generator),
        torch.randint(3, VOCAB, (9,), generator=generator),
    )


def loss(model: LanguageModel, samples: list[Tensor], seeds: list[int]) -> float:
    return model(pack(samples, samples), num_tokens=1, noise_seeds=seeds).item()


def test_a_samples_loss_does_not_depend_on_its_packed_neighbors() -> None:
    model, (first, second) = adapted(), two_sequences()
    apart = loss(model, [first], [7]) + loss(model, [second], [8])
    assert loss(model, [first, second], [7, 8]) == pytest.approx(apart, rel=1e-5)
    assert loss(model, [second, first], [8, 7]) == pytest.approx(apart, rel=1e-5)


def test_masks_depend_on_the_seed_and_evaluation_has_no_dropout() -> None:
    model, (first, _) = adapted(), two_sequences()
    seven, eight = loss(model, [first], [7]), loss(model, [first], [8])
    model.eval()
    assert len({seven, eight, loss(model, [first], [7])}) == 3
    assert loss(model, [first], [7]) == loss(model, [first], [8])


def test_activation_checkpointing_recomputes_with_the_same_masks() -> None:
    samples = list(two_sequences())
    found = []
    for checkpointing in (False, True):
        model = adapted(activation_checkpointing=checkpointing)
        model(pack(samples, samples), num_tokens=1, noise_seeds=[7, 8]).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) > 10
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_kept_inputs_are_scaled_and_layers_draw_different_masks() -> None:
    masks = []
    for layer in (0, 1):
        dropout = SequenceDropout(0.25, layer)
        dropout.lengths, dropout.seeds = [400], [3]
        masks.append(dropout(torch.ones(1, 400, 50)))
        assert masks[-1].unique().tolist() == pytest.approx([0, 4 / 3])
        assert masks[-1].mean().item() == pytest.approx(1, abs=0.02)
    assert not torch.equal(*masks)

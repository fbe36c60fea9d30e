"""Prepare a Hugging Face model for training: no noise of its own, and every token learns."""

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

NOISE_WORDS = ("drop", "jitter")  # in names of probabilities and amplitudes


def prepare_for_training(model: PreTrainedModel, name: str | None) -> PreTrainedModel:
    """Return `model` in training mode, without noise.

    Args:
        name: what adapters store as the name of their base.
    """
    if name is not None:
        model.name_or_path = name  # not the local copy's path
    for module in model.modules():
        _switch_off_noise(module)
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # pad may double as eos, which must be trained
    return model.train()


def _switch_off_noise(module: nn.Module) -> None:
    """Set the module's probabilities of dropout and amplitudes of jitter to 0.

    Such noise would depend on worker and micro-batch. The model's config keeps its values.
    """
    if isinstance(module, _DropoutNd):
        module.p = 0.0
    values = vars(module)
    for name, value in values.items():
        if isinstance(value, float) and any(word in name for word in NOISE_WORDS):
            values[name] = 0.0

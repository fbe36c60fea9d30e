"""Frozen linear layers in 4 or 8 bits by bitsandbytes (QLoRA, https://arxiv.org/abs/2305.14314)."""

import importlib.util
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from medgpt.config.base import ConfigError, ModelError

Quantization = Literal["nf4", "int8"]


def check_bitsandbytes(kind: Quantization) -> None:
    """Raise ConfigError if the package is missing. Imports nothing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.lora.quantize={kind} needs the package bitsandbytes; pip install "
            "'medgpt[qlora]', or leave it out"
        )


def loading_options(kind: Quantization, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that quantize all linear layers but the output.

    Args:
        dtype: of activations, to which the weights of a layer are dequantized in its forward.
    """
    check_bitsandbytes(kind)
    settings: dict[str, Any] = {"load_in_8bit": True}
    if kind == "nf4":
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }
    return {"quantization_config": BitsAndBytesConfig(**settings)}


def check_quantizable(model: nn.Module, name: str, kind: Quantization) -> None:
    """Raise ConfigError if a large part of the weights would stay as it is.

    Experts of a mixture are stacked in one parameter, which bitsandbytes does not quantize.
    """
    check_bitsandbytes(kind)
    stacked = [key for key, weight in model.named_parameters() if weight.dim() > 2]
    if stacked:
        raise ModelError(
            name,
            f"model.lora.quantize={kind} would leave {stacked[0]} and other experts as they are; "
            "leave it out, or use a model without experts",
        )


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the quantized layers of a model, by name."""
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit | Linear8bitLt):
            yield name, layer


def keep_weights_in_place(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from reordering weights in evaluation, where a CPU has bf16 instructions.

    Its kernel for that order computes in bf16, and a backward pass would read the weights wrongly.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for _, layer in quantized_layers(model):
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False


@torch.no_grad()
def copy_dequantized(quantized: PreTrainedModel, model: PreTrainedModel) -> None:
    """Replace the weights of `model`, in fp32, by those that the quantized one computes with."""
    from peft.utils.integrations import dequantize_module_weight  # slow to import

    for name, layer in quantized_layers(quantized):
        target = model.get_submodule(name)
        weight = dequantize_module_weight(layer)
        assert isinstance(target.weight, torch.Tensor)
        target.weight.copy_(weight.T if isinstance(target, Conv1D) else weight)

"""How fast it could go: floating-point operations and bytes of memory against what devices have."""

from dataclasses import dataclass

from medgpt.models.model_shapes import Outline
from medgpt.planning import activations
from medgpt.planning.hardware import Device


def forward_flops(model: Outline, length: float) -> float:
    """Of a token in a piece of `length` tokens: 2 for every parameter that it is multiplied with
    (Kaplan et al., 2020, arXiv 2001.08361, table 1), and 4 for every number of a head and token
    attended to, in each layer (Chowdhery et al., 2022, arXiv 2204.02311, appendix B; half of it
    where attention is causal)."""
    attended = length / 2 if model.gated else length
    heads = model.num_heads * model.head_size
    return 2 * model.num_in_products + 4 * model.num_layers * heads * attended


def train_flops(model: Outline, length: float, *, checkpointing: bool) -> float:
    """Of a token in forward and backward pass: three times the forward pass, a fourth time where
    it is computed again; frozen weights need no gradient of their own."""
    forward = forward_flops(model, length)
    times = 3 if model.num_frozen == 0 else 2
    return forward * (times + checkpointing)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens per second of one worker."""

    at_peak: float
    """No worker is faster."""
    expected: float
    """At the assumed share of the peak."""


def compute_speed(flops: float, device: Device, *, devices: float, mfu: float) -> Speed:
    """Args: devices: cores, or the part of a GPU, that a worker has."""
    peak = device.tflops * 1e12 * devices / flops
    return Speed(at_peak=peak, expected=peak * mfu)


def decode_speed(
    model: Outline,
    device: Device,
    *,
    devices: float,
    rows: int,
    prompt: int,
    response: int,
    b: int,
    mfu: float,
) -> Speed:
    """New tokens per second of a worker that decodes `rows` at a time.

    A step reads all weights once and every row's keys and values: bound by memory (Pope et al.,
    2022, arXiv 2211.05102, section 2), else by its products. Prompts are read at once, before.
    """
    context = prompt + response / 2
    bytes_ = b * model.num_params + activations.cache(model, round(rows * context), b)
    reading = bytes_ / (device.memory_gb_per_s * 1e9 * devices)
    flops = forward_flops(model, 2 * context if model.gated else context)
    peak = device.tflops * 1e12 * devices
    prompts = prompt * forward_flops(model, prompt) / response  # for each new token
    step = max(reading, rows * flops / peak) + rows * prompts / peak
    slower = max(reading, rows * flops / (peak * mfu)) + rows * prompts / (peak * mfu)
    return Speed(at_peak=rows / step, expected=rows / slower)

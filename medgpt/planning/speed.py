"""How fast it could go: floating-point operations and bytes of memory against what devices have."""

from dataclasses import dataclass

from medgpt.models.model_shapes import ModelShape
from medgpt.planning import activations
from medgpt.planning.hardware import Device


def forward_flops(model: ModelShape, length: float) -> float:
    """Of a token in a piece of `length` tokens: 2 for every parameter that it is multiplied with
    (Kaplan et al., 2020, arXiv 2001.08361, table 1), and 4 for every number of a head and token
    attended to, in each layer (Chowdhery et al., 2022, arXiv 2204.02311, appendix B; half of it
    where attention is causal)."""
    attended = length / 2 if model.has_gated_mlp else length
    heads = model.num_heads * model.head_dim
    return 2 * model.num_matmul_params + 4 * model.num_layers * heads * attended


def train_flops(model: ModelShape, length: float, *, checkpointing: bool) -> float:
    """Of a token in forward and backward pass: three times the forward pass, a fourth time where
    it is computed again; frozen weights need no gradient of their own."""
    forward = forward_flops(model, length)
    num_passes = 3 if model.num_frozen == 0 else 2
    return forward * (num_passes + checkpointing)


@dataclass(frozen=True, kw_only=True)
class TokenSpeed:
    """Tokens per second of one worker."""

    at_peak: float
    """No worker is faster."""
    expected: float
    """At the assumed share of the peak."""


def compute_speed(flops: float, device: Device, *, devices: float, mfu: float) -> TokenSpeed:
    """Args: devices: cores, or the part of a GPU, that a worker has."""
    peak = device.tflops * 1e12 * devices / flops
    return TokenSpeed(at_peak=peak, expected=peak * mfu)


def decode_speed(
    model: ModelShape,
    device: Device,
    *,
    devices: float,
    rows: int,
    prompt: int,
    response: int,
    b: int,
    mfu: float,
) -> TokenSpeed:
    """New tokens per second of a worker that decodes `rows` at a time.

    A step reads all weights once and every row's keys and values: bound by memory (Pope et al.,
    2022, arXiv 2211.05102, section 2), else by its products. Prompts are read at once, before.
    """
    context = prompt + response / 2
    bytes_ = b * model.num_params + activations.kv_cache_bytes(model, round(rows * context), b)
    read_s = bytes_ / (device.memory_gb_per_s * 1e9 * devices)
    flops = forward_flops(model, 2 * context if model.has_gated_mlp else context)
    peak = device.tflops * 1e12 * devices
    prompt_flops = prompt * forward_flops(model, prompt) / response  # for each new token
    peak_step_s = max(read_s, rows * flops / peak) + rows * prompt_flops / peak
    expected_step_s = max(read_s, rows * flops / (peak * mfu)) + rows * prompt_flops / (peak * mfu)
    return TokenSpeed(at_peak=rows / peak_step_s, expected=rows / expected_step_s)

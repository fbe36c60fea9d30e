"""Upper bounds and estimates of speed: FLOPs and memory traffic divided by what devices offer."""

from medgpt.models.model_shapes import ModelShape
from medgpt.planning import activations
from medgpt.planning.hardware import Device


def forward_flops(model: ModelShape, length: float) -> float:
    """Return FLOPs per token of a sequence of `length` tokens: 2 for every parameter it is
    multiplied with (Kaplan et al., 2020, arXiv 2001.08361, table 1), and 4 for every head dimension
    and attended token in each layer (Chowdhery et al., 2022, arXiv 2204.02311, appendix B), half of
    it if attention is causal."""
    attended = length / 2 if model.is_causal else length
    heads = model.num_heads * model.head_dim
    return 2 * model.num_matmul_params + 4 * model.num_layers * heads * attended


def train_flops(model: ModelShape, length: float, *, checkpointing: bool) -> float:
    """Return FLOPs per token of forward and backward pass: three times the forward pass, twice if
    some weights are frozen, once more with checkpointing."""
    forward = forward_flops(model, length)
    num_passes = 3 if model.num_frozen == 0 else 2
    return forward * (num_passes + checkpointing)


def compute_speed(flops: float, device: Device, *, devices: float, mfu: float) -> float:
    """Return tokens per second of a compute-bound worker.

    Args:
        flops: per token.
        devices: CPU cores, or the share of a GPU, of the worker.
        mfu: share of the peak FLOP/s that is reached; 1 gives an upper bound.
    """
    return device.tflops * 1e12 * devices / flops * mfu


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
) -> float:
    """Return new tokens per second of a worker that decodes `rows` sequences at a time.

    A step reads once the weights of all experts that its rows use, all other weights, and the KV
    cache of every row. It is bound by this memory traffic
    (Pope et al., 2022, arXiv 2211.05102, section 2) or by its FLOPs. Prompts are prefilled first.
    """
    context = prompt + response / 2
    bytes_ = b * model.num_used_by(rows) + activations.kv_cache_bytes(
        model, round(rows * context), b
    )
    read_s = bytes_ / (device.memory_gb_per_s * 1e9 * devices)
    flops = forward_flops(model, 2 * context if model.is_causal else context)
    flops_per_s = device.tflops * 1e12 * devices * mfu
    prompt_flops = prompt * forward_flops(model, prompt) / response  # per new token
    step_s = max(read_s, rows * flops / flops_per_s) + rows * prompt_flops / flops_per_s
    return rows / step_s

"""Counted collectives and bytes of an optimizer step, projected to 64 nodes.

    python -m tests.bench.weak_scaling

Counted: every call that DeepSpeed makes to torch.distributed in a step of the real Engine, on 1, 2
and 4 gloo ranks at ZeRO 1 to 3, two micro-batches each, after three steps (ZeRO-3 learns the order
of its weights in the first). The model of `medgpt.planning.communication` is compared with each
count. It is then projected to nodes of 8 GPUs whose work grows with their number. Counts, not
times: loopback says nothing of a network.
"""

import argparse
import itertools
import json
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tests.bench import common

SIZES = {"30M": (512, 8, 8000), "100M": (768, 12, 18000)}
RANKS, STAGES, MICRO_BATCHES = (1, 2, 4), (1, 2, 3), 2
WARM_UP = 3  # steps
TOKENS = 16
SMALL_BYTES = 64
KINDS = {
    "all_reduce": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
}
NODES = (1, 2, 4, 8, 16, 32, 64)
NETWORKS = {"100 Gbit/s": 12.5, "400 Gbit/s": 50.0, "3200 Gbit/s": 400.0}
PROJECTED_TOKENS, MFU = 8192, 0.4
PROJECTED = (
    "Qwen2.5-7B's sizes, bf16, 8 H100 a node, 2 micro-batches of 8,192 tokens, checkpointing"
)


def architecture(hidden: int, layers: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": hidden // 64,
        "intermediate_size": hidden * 11 // 4,
    }


# ---- a rank ----


def count(size: str, zero_stage: int, out: Path) -> None:
    """Write {kind: [calls, bytes]} of this rank's step."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    step = trainer(size, zero_stage)
    for _ in range(WARM_UP):
        step()
    calls, sizes = wrap_collectives()
    step()
    counts = {kind: [calls[kind], sizes[kind]] for kind in calls}
    if dist.get_rank() == 0:
        out.write_text(json.dumps(counts), "utf-8")
    dist.destroy_process_group()


def trainer(size: str, zero_stage: int) -> Any:
    import numpy as np
    import torch

    from medgpt.config.model import ModelConfig
    from medgpt.config.train import EngineConfig, OptimizerConfig
    from medgpt.data.loader.collate import packed_batch
    from medgpt.engine import Engine
    from medgpt.models.language_model import LanguageModel
    from medgpt.models.load import SpecialTokenIds, build_model

    hidden, layers, vocab = SIZES[size]
    config = ModelConfig.model_validate({"architecture": architecture(hidden, layers)})
    model = build_model(
        config, head_kind="clm", vocab_size=vocab, special_ids=SpecialTokenIds(), seed=0
    )
    engine = Engine(
        LanguageModel(model, max_batch_tokens=TOKENS),
        engine=EngineConfig.model_validate({"zero_stage": zero_stage}),
        optimizer=OptimizerConfig(),
        total_steps=WARM_UP + 1,
        device=torch.device("cpu"),
    )
    ids = torch.arange(TOKENS)

    def step() -> None:
        for _ in range(MICRO_BATCHES):
            batch = packed_batch(ids, ids, np.array([TOKENS]))
            engine.backward(engine(batch, num_tokens=TOKENS * MICRO_BATCHES))
        engine.step()

    return step


def wrap_collectives() -> tuple[Counter[str], Counter[str]]:
    """Count calls and bytes by kind that DeepSpeed requests from its backend from now on.

    Bytes are of what is reduced, or of what a gather results in. Messages of a few numbers, as
    norms are, count apart.
    """
    from deepspeed import comm

    backend, calls, sizes = comm.comm.cdb, Counter[str](), Counter[str]()
    whole = {  # which argument is the whole of the message
        "all_reduce": (0, "tensor"),
        "all_gather_into_tensor": (0, "output_tensor"),
        "reduce_scatter_tensor": (1, "input_tensor"),
    }

    def counting(name: str, function: Any) -> Any:
        place, key = whole[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = kwargs[key] if key in kwargs else args[place]
            num_bytes = tensor.numel() * tensor.element_size()
            kind = KINDS[name] if num_bytes > SMALL_BYTES else "small"
            calls[kind] += 1
            sizes[kind] += num_bytes
            return function(*args, **kwargs)

        return call

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("a collective that is not counted")

    for name in whole:
        setattr(backend, name, counting(name, getattr(backend, name)))
    for name in ("broadcast", "all_gather", "reduce", "reduce_scatter", "all_to_all_single"):
        setattr(backend, name, refused)
    return calls, sizes


# ---- against the model ----


def compare(size: str, zero_stage: int, ranks: int, counts: dict[str, list[int]]) -> float:
    """Print counted and predicted bytes and calls; return the largest error of bytes."""
    from medgpt.config.model import ModelConfig
    from medgpt.models.model_shapes import model_shape
    from medgpt.planning.communication import step_collectives

    hidden, layers, vocab = SIZES[size]
    config = ModelConfig.model_validate({"architecture": architecture(hidden, layers)})
    model = model_shape(config, "clm", vocab_size=vocab)
    expected = {
        message.kind: message
        for message in step_collectives(
            model, zero_stage=zero_stage, num_ranks=ranks, micro_batches=MICRO_BATCHES, b=4
        )
    }
    counted = {kind: (calls, size) for kind, (calls, size) in counts.items() if kind != "small"}
    if ranks == 1:  # what DeepSpeed asks of a rank alone goes nowhere
        counted, expected = {}, {}
    worst, parts = 0.0, []
    for kind in sorted(counted.keys() | expected.keys()):
        calls, num_bytes = counted.get(kind, (0, 0))
        message = expected.get(kind)
        error = (message.num_bytes if message else 0) / max(1, num_bytes) - 1
        worst = max(worst, abs(error))
        parts.append(
            f"{kind} {num_bytes / 2**20:,.1f} MiB in {calls} calls, predicted "
            f"{message.num_bytes / 2**20 if message else 0:,.1f} ({error:+.2%}) in "
            f"{message.num_calls if message else 0}"
        )
    print(f"{size}, ZeRO {zero_stage}, {ranks} ranks: {'; '.join(parts) or 'nothing'}", flush=True)
    return worst


def project() -> None:
    """Project the weak scaling of a 7B model: the same work per GPU on more nodes."""
    from medgpt.planning.communication import LinkSpeeds, communication_seconds, step_collectives
    from medgpt.planning.hardware import load_known_devices
    from medgpt.planning.speed import compute_speed, train_flops

    model, device = qwen_7b(), load_known_devices()["H100"]
    tokens = MICRO_BATCHES * PROJECTED_TOKENS
    flops = train_flops(model, PROJECTED_TOKENS, checkpointing=True)
    compute = tokens / compute_speed(flops, device, devices=1, mfu=MFU)
    print(f"projected: {PROJECTED}, {MFU:.0%} of the peak: {compute:.2f} s of computing a step")
    for network, speed in NETWORKS.items():
        for stage in STAGES:
            shares = []
            for nodes in NODES:
                ranks = 8 * nodes
                links = LinkSpeeds(
                    ranks_per_node=8,
                    intra_node_gb_per_s=device.link_gb_per_s,
                    network_gb_per_s=speed,
                )
                counts = step_collectives(
                    model, zero_stage=stage, num_ranks=ranks, micro_batches=MICRO_BATCHES, b=2
                )
                exchange = communication_seconds(counts, ranks, links)
                step = max(compute, exchange) if stage == 3 else compute + exchange
                shares.append(f"{nodes}: {compute / step:.0%}")
            print(f"{network} a node, ZeRO {stage}: efficiency on nodes {', '.join(shares)}")


def qwen_7b() -> Any:
    """Return the shape of Qwen2.5-7B."""
    from medgpt.config.model import ModelConfig
    from medgpt.models.model_shapes import model_shape

    sizes = {
        "hidden_size": 3584,
        "num_layers": 28,
        "num_heads": 28,
        "num_kv_heads": 4,
        "intermediate_size": 18944,
        "tie_embeddings": False,
    }
    config = ModelConfig.model_validate({"architecture": sizes})
    return model_shape(config, "clm", vocab_size=152064)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--count", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.count:
        size, stage, out = arguments.count
        count(size, int(stage), Path(out))
        return
    worst = 0.0
    for size, stage, ranks in itertools.product(arguments.sizes, STAGES, RANKS):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "counts.json"
            command = common.torchrun(
                "tests.bench.weak_scaling", "--count", size, stage, out, ranks=ranks
            )
            subprocess.run(command, check=True, env=common.environment())
            worst = max(worst, compare(size, stage, ranks, json.loads(out.read_text("utf-8"))))
    print(f"largest error of bytes: {worst:.2%}")
    project()


if __name__ == "__main__":
    main()

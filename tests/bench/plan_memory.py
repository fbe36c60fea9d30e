"""Memory of a worker as `medgpt plan` predicts it, beside that of real runs on the CPU.

    python -m tests.bench.plan_memory

A case is a model and a ZeRO stage: two fresh gloo ranks train it by the real Engine for three steps
of two micro-batches, then for one more while they hold a checkpoint's snapshot. Measured is the
peak of resident memory minus what is resident after the imports, of the rank that needs more. A
checkpoint is left out where it would take both ranks together above 12 GiB. `--live` compares what
torch allocates instead, of a small model, also in bf16 and with offload: the numbers that a GPU's
prediction consists of.
"""

import argparse
import gc
import itertools
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.bench import common

SIZES = {"100M": (768, 12, 18000), "175M": (896, 16, 20000), "228M": (1024, 16, 22000)}
TINY, TINY_TOKENS = (128, 2, 1000), 16
LIMIT_BYTES = 12 * 2**30
STEPS, MICRO_BATCHES, NUM_RANKS = 3, 2, 2
TIMEOUT_S = 1800


@dataclass(frozen=True, kw_only=True)
class Case:
    hidden: int
    layers: int
    vocab: int
    zero_stage: int
    tokens: int
    snapshot: bool = True
    precision: str = "fp32"
    offload: bool = False
    checkpointing: bool = False

    @property
    def model(self) -> Any:
        from medgpt.config.model import ModelConfig

        return ModelConfig.model_validate(
            {
                "architecture": {
                    "hidden_size": self.hidden,
                    "num_layers": self.layers,
                    "num_heads": self.hidden // 64,
                    "intermediate_size": self.hidden * 11 // 4,
                }
            }
        )

    @property
    def engine(self) -> Any:
        from medgpt.config.train import EngineConfig

        return EngineConfig.model_validate(
            {
                "zero_stage": self.zero_stage,
                "precision": self.precision,
                "offload_optimizer": self.offload,
                "activation_checkpointing": self.checkpointing,
            }
        )


def predicted(case: Case) -> Any:
    """Return (model shape, training setup) for medgpt.planning."""
    from medgpt.models.model_shapes import model_shape
    from medgpt.planning.activations import MicroBatch
    from medgpt.planning.memory import TrainingSetup

    batch = MicroBatch(
        num_tokens=case.tokens,
        num_labels=case.tokens,
        loss_chunk_tokens=case.engine.loss_chunk_tokens,
        activation_checkpointing=case.checkpointing,
    )
    setting = TrainingSetup(
        zero_stage=case.zero_stage,
        num_ranks=NUM_RANKS,
        bytes_per_weight={"fp32": 4, "bf16": 2}[case.precision],
        micro_batch=batch,
        offload_optimizer=case.offload,
        on_gpu=False,
        is_saving_checkpoint=case.snapshot,
    )
    return model_shape(case.model, "clm", vocab_size=case.vocab), setting


def predicted_peak(case: Case) -> float:
    from medgpt.planning.memory import train_memory

    return train_memory(*predicted(case)).worst_phase.total_bytes


# ---- a rank ----


def run_ranks(case: Case, measure: str) -> list[dict[str, float]]:
    """Return the result of `measure` (resident or live) on each of two fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        command = common.torchrun(
            "tests.bench.plan_memory",
            *("--case", json.dumps(asdict(case)), "--measure", measure, "--out", folder),
            ranks=NUM_RANKS,
        )
        subprocess.run(command, check=True, env=common.environment(), timeout=TIMEOUT_S)
        return [json.loads(file.read_text("utf-8")) for file in sorted(Path(folder).iterdir())]


def measure_resident(case: Case) -> dict[str, float]:
    """Return peaks in bytes beyond the resident memory after the imports."""
    from medgpt.engine.setup import keep_freed_memory

    keep_freed_memory()
    gc.collect()
    after_imports = process_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    engine, step = trainer(case)
    for _ in range(STEPS):
        step()
    peaks = {"training": float(process_status("VmHWM") - after_imports)}
    if case.snapshot:
        kept = engine.snapshot()
        step()
        peaks["saving"] = float(process_status("VmHWM") - after_imports)
        del kept
    return peaks


def measure_allocated(case: Case) -> dict[str, float]:
    """Return the peak of torch's allocations in bytes, in a step after the first.

    The least of several steps: when a thread of gloo is the last to let a tensor go, that comes
    late, or not at all in the trace. A step leaves no more behind than it peaks.
    """
    from torch.profiler import ProfilerActivity, profile

    def traced(function: Callable[[], Any]) -> tuple[Any, list[int]]:
        """Return the result and the allocated bytes after each change."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            result = function()
        events = trace.profiler.kineto_results.events()  # type: ignore[union-attr]
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        return result, list(itertools.accumulate(size for _, size in changes))

    (_, step), held = traced(lambda: trainer(case))
    step()
    return {"live": held[-1] + min(max(traced(step)[1]) for _ in range(STEPS))}


def process_status(key: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def trainer(case: Case) -> tuple[Any, Callable[[], None]]:
    """Return a fresh engine and a function that runs a step."""
    import torch

    from medgpt.config.train import OptimizerConfig
    from medgpt.engine import Engine
    from medgpt.models.language_model import LanguageModel
    from medgpt.models.load import SpecialTokenIds, build_model

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.precision]
    model = build_model(
        case.model,
        head_kind="clm",
        vocab_size=case.vocab,
        special_ids=SpecialTokenIds(),
        seed=0,
        dtype=dtype,
    )
    module = LanguageModel(
        model,
        loss_chunk_tokens=case.engine.loss_chunk_tokens,
        max_batch_tokens=case.tokens,
        activation_checkpointing=case.checkpointing,
    )
    del model
    engine = Engine(
        module,
        engine=case.engine,
        optimizer=OptimizerConfig(),
        total_steps=STEPS + 1,
        device=torch.device("cpu"),
    )
    batches = micro_batches(case)

    def step() -> None:
        for _ in range(MICRO_BATCHES):
            engine.backward(engine(next(batches), num_tokens=case.tokens * NUM_RANKS))
        engine.step()

    return engine, step


def micro_batches(case: Case) -> Iterator[Any]:
    """Yield micro-batches of two sequences of random tokens."""
    import numpy as np
    import torch

    from medgpt.data.loader.collate import packed_batch

    generator = torch.Generator().manual_seed(0)
    pieces = np.array([case.tokens // 3, case.tokens - case.tokens // 3])
    for _ in itertools.count():
        ids, labels = torch.randint(case.vocab, (2, case.tokens), generator=generator)
        yield packed_batch(ids, labels, pieces)


def run_rank(case: Case, measure: str, out: Path) -> None:
    import torch
    import torch.distributed as dist

    import medgpt.engine
    import medgpt.models.language_model
    import medgpt.models.load  # noqa: F401 - before memory is measured

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT_S))
    peaks = {"resident": measure_resident, "live": measure_allocated}[measure](case)
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(peaks), "utf-8")
    dist.barrier()


# ---- tables ----


def compare(case: Case) -> list[tuple[str, float, float]]:
    """Return (phase, predicted, measured) in bytes: during training, and during a checkpoint."""
    if 2 * predicted_peak(case) > LIMIT_BYTES:
        case = replace(case, snapshot=False)
    peaks = run_ranks(case, "resident")
    rows = [("training", predicted_peak(replace(case, snapshot=False)))]
    if case.snapshot:
        rows.append(("saving", predicted_peak(case)))
    return [(name, expected, max(rank[name] for rank in peaks)) for name, expected in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--tokens", type=int, default=256, help="of a micro-batch")
    parser.add_argument(
        "--live", action="store_true", help="what torch allocates, of a small model"
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        run_rank(Case(**json.loads(arguments.case)), arguments.measure, arguments.out)
    elif arguments.live:
        print_allocated()
    else:
        print_resident(arguments)


def print_resident(arguments: argparse.Namespace) -> None:
    worst = 0.0
    for name in ("0.5M", *arguments.sizes):
        for stage in arguments.stages:
            hidden, layers, vocab = {"0.5M": TINY, **SIZES}[name]
            tokens = TINY_TOKENS if name == "0.5M" else arguments.tokens
            case = Case(hidden=hidden, layers=layers, vocab=vocab, zero_stage=stage, tokens=tokens)
            parts = []
            for what, expected, measured in compare(case):
                error = expected / measured - 1
                parts.append(
                    f"{what} {expected / 2**20:,.0f} predicted, {measured / 2**20:,.0f} measured "
                    f"({error:+.1%})"
                )
                worst = max(worst, abs(error)) if name != "0.5M" else worst
            print(f"{name} parameters, ZeRO {stage}, MiB: {'; '.join(parts)}", flush=True)
    print(f"largest error from {min(SIZES)} on: {worst:.1%}")


def print_allocated() -> None:
    from medgpt.planning.memory import allocated_phases, offloaded_bytes

    base = Case(hidden=512, layers=8, vocab=8000, zero_stage=0, tokens=128, snapshot=False)
    cases = [replace(base, zero_stage=stage) for stage in range(4)]
    cases += [replace(base, zero_stage=stage, checkpointing=True) for stage in range(4)]
    for stage in (1, 2, 3):
        low = replace(base, zero_stage=stage, precision="bf16", tokens=16)  # slow on a CPU
        cases += [low, replace(low, offload=True)]
    for case in cases:
        model, setting = predicted(case)
        host = sum(offloaded_bytes(model, setting).values())
        expected = host + max(phase.total_bytes for phase in allocated_phases(model, setting))
        measured = max(rank["live"] for rank in run_ranks(case, "live"))
        print(
            f"ZeRO {case.zero_stage}, {case.precision}{', offload' * case.offload}"
            f"{', checkpointing' * case.checkpointing}, MiB: {expected / 2**20:.0f} predicted, "
            f"{measured / 2**20:.0f} measured ({expected / measured - 1:+.1%})",
            flush=True,
        )


if __name__ == "__main__":
    main()

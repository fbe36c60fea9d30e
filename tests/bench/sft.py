"""Fine-tuning speed: medgpt with two workers beside TRL's SFTTrainer, packed and as it comes.

`python -m tests.bench.sft` prints real tokens per second, without padding, and the ratios;
`--sweep` runs TRL once in each of its packing settings instead, to see which is its best.
"""

import argparse
import json
import shutil
from functools import partial
from typing import Any

from tests.bench import common

# rows of 512 tokens in an optimizer step, on both cores together
ROWS = 8
PACKED = {"packing": True, "packing_strategy": "bfd", "gradient_checkpointing": False}
FIRST, LAST = 4, 24


def medgpt(
    args: argparse.Namespace, steps: tuple[int, int] = (FIRST, LAST), **overrides: object
) -> common.Window:
    """Run medgpt; the window begins after the first of `steps` and ends with the second."""
    data, base = common.workload(args.dir, args.size)
    run = args.dir / "medgpt"
    shutil.rmtree(run, ignore_errors=True)
    micro = ROWS // int(str(overrides.get("cluster.num_workers", 2)))
    keys = {
        "train.max_steps": steps[1],
        "train.global_batch_size": ROWS,
        "train.micro_batch_size": min(4, micro),
        **overrides,
    }
    command = common.medgpt_sft(data, base, run, **keys)
    return common.measure(command, run / "metrics.jsonl", first=steps[0], last=steps[1])


def trl(args: argparse.Namespace, config: dict[str, Any], *, ranks: int = 2) -> common.Window:
    """Run TRL on `ranks` processes that share the two cores."""
    data, base = common.workload(args.dir, args.size)
    metrics = args.dir / "trl.jsonl"
    threads = 2 // ranks
    config = {"max_length": common.MAX_LENGTH, "max_steps": LAST, **config}
    arguments = (data, base, metrics, json.dumps(config), "--threads", threads)
    command = common.torchrun("tests.bench.trl_sft", *arguments, ranks=ranks)
    env = {"OMP_NUM_THREADS": str(threads)}
    return common.measure(command, metrics, first=FIRST, last=LAST, env=env)


def packed(rows: int, ranks: int, **changes: Any) -> dict[str, Any]:
    """Return the config of TRL's packing: `rows` rows per forward pass, ROWS per step."""
    steps = ROWS // rows // ranks
    return {
        **PACKED,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": steps,
        **changes,
    }


def sweep(args: argparse.Namespace) -> None:
    """Try TRL's packing strategies, rows per forward pass, and ranks."""
    for strategy in ("bfd", "bfd_split", "wrapped"):
        for ranks in (1, 2):
            for rows in (1, 2, 4):
                config = packed(rows, ranks, packing_strategy=strategy)
                window = trl(args, config, ranks=ranks)
                print(
                    f"{strategy}, {ranks} ranks, {rows} rows: {window.tokens_per_s:,.0f} tokens/s"
                )


def main() -> None:
    parser = common.options(__doc__, rounds=5)
    parser.add_argument("--sweep", action="store_true")
    args = parser.parse_args()
    if args.sweep:
        sweep(args)
        return
    peak = common.gemm_gflops()
    contenders = common.alternate(
        {
            "medgpt": partial(medgpt, args),
            "TRL packed": partial(trl, args, packed(1, 2)),
            "TRL default": partial(trl, args, {}),
        },
        rounds=args.rounds,
        results=args.results,
    )
    speed = {name: [w.tokens_per_s for w in windows] for name, windows in contenders.items()}
    for name, values in speed.items():
        print(f"{name}: {common.spread(values, ',.0f')} tokens/s")
    for peer in ("TRL packed", "TRL default"):
        print(f"medgpt / {peer}: {common.spread(common.ratios(speed['medgpt'], speed[peer]))}")
    shares = [
        args.size.flops(w.tokens, w.targets) / w.wall_s / 1e9 / peak for w in contenders["medgpt"]
    ]
    print(f"medgpt, share of {peak:.0f} GFLOP/s (fp32 GEMM, both cores): {common.spread(shares)}")


if __name__ == "__main__":
    main()

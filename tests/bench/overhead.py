"""Overhead of Ray Data, Ray Train and DeepSpeed: medgpt beside a bare PyTorch loop.

`python -m tests.bench.overhead` prints the ratios of wall time and of CPU seconds. The loop keeps
the optimizer's states in full on each rank, as ZeRO 0 does; `--zero-stage 2` shows what sharding
them adds.
"""

import argparse
from functools import partial

from tests.bench import common
from tests.bench.sft import ROWS, medgpt

FIRST, LAST = 6, 22
MICRO = 4


def bare(args: argparse.Namespace, *, ranks: int = 2) -> common.Window:
    """Run the bare loop on the prepared data of a medgpt run."""
    _, base = common.workload(args.dir, args.size)
    metrics = args.dir / "bare.jsonl"
    command = common.torchrun(
        "tests.bench.bare_loop",
        args.dir / "medgpt",
        base,
        metrics,
        f"--rows={ROWS}",
        f"--micro={MICRO}",
        f"--steps={LAST}",
        ranks=ranks,
    )
    return common.measure(command, metrics, first=FIRST, last=LAST)


def main() -> None:
    parser = common.options(__doc__, rounds=10)
    parser.add_argument("--zero-stage", type=int, default=0)
    args = parser.parse_args()
    keys = {"train.micro_batch_size": MICRO, "engine.zero_stage": args.zero_stage}
    windows = common.alternate(
        {"medgpt": partial(medgpt, args, (FIRST, LAST), **keys), "bare loop": partial(bare, args)},
        rounds=args.rounds,
        results=args.results,
    )
    ours, theirs = windows["medgpt"], windows["bare loop"]
    assert {w.tokens for w in ours} == {w.tokens for w in theirs}, "not the same batches"
    wall = common.ratios([w.wall_s for w in ours], [w.wall_s for w in theirs])
    cpu = common.ratios([w.cpu_s for w in ours], [w.cpu_s for w in theirs])
    print(f"medgpt / bare loop, wall time: {common.spread(wall)}")
    print(f"medgpt / bare loop, CPU seconds: {common.spread(cpu)}")


if __name__ == "__main__":
    main()

"""What Ray Data, Ray Train and DeepSpeed cost: medgpt beside a bare PyTorch loop, same steps.

`python -m tests.bench.overhead` prints the ratios of wall time and of CPU seconds.
"""

import argparse
from functools import partial

from tests.bench import common
from tests.bench.sft import ROWS, medgpt

FIRST, LAST = 8, 48
MICRO = 4


def bare(args: argparse.Namespace) -> common.Window:
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
    )
    return common.measure(command, metrics, first=FIRST, last=LAST)


def main() -> None:
    args = common.options(__doc__, rounds=10).parse_args()
    run = partial(medgpt, args, (FIRST, LAST), **{"train.micro_batch_size": MICRO})
    found = common.alternate(
        {
            "medgpt": partial(run, **{"engine.zero_stage": 0}),
            "medgpt ZeRO-2": partial(run, **{"engine.zero_stage": 2}),
            "bare loop": partial(bare, args),
        },
        rounds=args.rounds,
        results=args.results,
    )
    theirs = found["bare loop"]
    for name in ("medgpt", "medgpt ZeRO-2"):
        ours = found[name]
        assert {w.tokens for w in ours} == {w.tokens for w in theirs}, "not the same batches"
        wall = common.ratios([w.wall_s for w in ours], [w.wall_s for w in theirs])
        cpu = common.ratios([w.cpu_s for w in ours], [w.cpu_s for w in theirs])
        print(f"{name} / bare loop, wall time: {common.spread(wall)}")
        print(f"{name} / bare loop, CPU seconds: {common.spread(cpu)}")


if __name__ == "__main__":
    main()

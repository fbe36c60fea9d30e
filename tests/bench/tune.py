"""Savings of shared reward and reference pools: a search with them beside one without.

`python -m tests.bench.tune` runs `medgpt tune` both ways, in turns, with all trials at the same
time, and prints the memory of all processes together, the time, and the ratios.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time

from tests.bench import common, ppo

SEARCH = """
base = "{base}"
overrides = [
    "ppo.max_iterations={iterations}",
    "judge.every={iterations}",
    "judge.triage=4",
    "judge.max_new_tokens=8",
    "pools.actor.num_workers=1",
    "pools.rollout.num_workers=1",
    "pools.actor.cpus_per_worker=0.05",
    "pools.critic.cpus_per_worker=0.05",
    "pools.rollout.cpus_per_worker=0.05",
    "pools.reward.cpus_per_worker=0.05",
    "pools.reference.cpus_per_worker=0.05",
]
[run]
dir = "{run}"
[search]
"ppo.kl_coef" = {{ loguniform = [0.01, 0.1] }}
[tune]
num_trials = {trials}
scheduler = "none"
shared_pools = {shared}
[check]
seeds = 0
"""
POLL_S = 0.5


def search(args: argparse.Namespace, *, shared: bool) -> common.Window:
    """Run one search to its end; `tokens` counts the answers that were trained on."""
    work, run = ppo.workload(args.dir, args.case), (args.dir / "tune").absolute()
    shutil.rmtree(run, ignore_errors=True)
    base, config = args.dir / "tune-base.toml", args.dir / "tune.toml"
    paths = {"base": work.base, "reward": work.reward, "dialogues": work.dialogues}
    paths_absolute = {name: path.absolute() for name, path in paths.items()}
    base.write_text(ppo.CONFIG.format(run=run, case=args.case, **paths_absolute), "utf-8")
    values = {"base": base.absolute(), "run": run, "shared": str(shared).lower()}
    values |= {"iterations": args.iterations, "trials": args.trials}
    config.write_text(SEARCH.format(**values), "utf-8")
    command = [sys.executable, "-m", "medgpt", "tune", str(config)]
    began, peak, cpu = time.monotonic(), 0.0, 0.0
    log = args.dir / "tune.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=common.environment()
        )
        usage = common.Usage(process.pid)
        while process.poll() is None:
            time.sleep(POLL_S)
            cpu, resident = usage()
            peak = max(peak, resident)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{log.read_text()[-3000:]}")
    samples = args.trials * args.iterations * ppo.BATCH
    wall_s = time.monotonic() - began
    return common.Window(tokens=samples, targets=0, wall_s=wall_s, cpu_s=cpu, peak_gb=peak)


def main() -> None:
    parser = common.options(__doc__, rounds=2)
    parser.add_argument("--case", type=ppo.Case.parse, default=ppo.CASES[2], metavar="MODEL:P:T")
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=4)
    args = parser.parse_args()
    os.environ |= common.THREADS
    args.dir.mkdir(parents=True, exist_ok=True)
    windows: dict[bool, list[common.Window]] = {False: [], True: []}
    for _ in range(args.rounds):
        for shared, mode_windows in windows.items():
            window = search(args, shared=shared)
            mode_windows.append(window)
            print(
                f"  {'shared' if shared else 'private'}: {window.peak_gb:.2f} GiB, "
                f"{window.wall_s:.1f} s, {window.cpu_s:.1f} CPU-s, load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
    for name in ("peak_gb", "wall_s", "cpu_s"):
        private, shared = ([getattr(w, name) for w in windows[way]] for way in (False, True))
        ratio = common.spread(common.ratios(shared, private))
        both = f"{common.spread(shared)} against {common.spread(private)}"
        print(f"{args.trials} trials of {args.case}, {name}: {both}; shared / private: {ratio}")


if __name__ == "__main__":
    main()

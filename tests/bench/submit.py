"""Seconds from `medgpt submit sft` to its first optimizer step, beside plain `medgpt sft`.

    python -m tests.bench.submit

The job goes, with a copy of the code, to a local cluster of its own that has run such a job before.
The plain command starts a Ray for itself, on the same machine and the same work, in turns with it.
"""

import os
import shutil
from pathlib import Path

from tests.bench import common
from tests.bench.startup import first_step, one_step
from tests.jobs.ray_cluster import ROOT, RayCluster, running_cluster

LIMIT = 1.3


def submitted(cluster: RayCluster, command: list[str], run: Path, folder: Path) -> float:
    """Submit `command` as a job from `folder`, which holds its config and the code."""
    python, _, _, stage, config, *overrides = command
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(
        ROOT / "medgpt", folder / "medgpt", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(config, folder / "stage.toml")
    submit = [python, "-m", "medgpt", "submit", stage, "stage.toml", *overrides]
    env = {"PYTHONPATH": str(folder), **_environment(cluster)}
    return first_step([*submit, "--address", cluster.address], run, env, folder)


def _environment(cluster: RayCluster) -> dict[str, str]:
    return {name: cluster.environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}


def main() -> None:
    args = common.options(__doc__, rounds=4).parse_args()
    args.dir = args.dir.absolute()
    run = args.dir / "submit"
    jobs, plain = [], []
    with running_cluster(num_cpus=(os.cpu_count() or 1) + 1, **common.THREADS) as cluster:
        submitted(cluster, one_step(args, run), run, args.dir / "typed")
        for _ in range(args.rounds):
            plain.append(first_step(one_step(args, run), run, {}))
            jobs.append(submitted(cluster, one_step(args, run), run, args.dir / "typed"))
            print(
                f"  plain {plain[-1]:.1f} s, submitted {jobs[-1]:.1f} s, "
                f"load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
    print(f"medgpt sft: first step after {common.spread(plain, '.1f')} s")
    print(f"medgpt submit sft: first step after {common.spread(jobs, '.1f')} s")
    ratio = common.spread(common.ratios(jobs, plain))
    print(f"submitted / plain: {ratio}, at most {LIMIT} is wanted")


if __name__ == "__main__":
    main()

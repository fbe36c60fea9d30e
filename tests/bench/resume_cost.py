"""Time of a resume late in an epoch beside one early in it, on a million short rows.

    python -m tests.bench.resume_cost

Indexing and planning run once and are reported apart. A resume is a new process that builds the
stream of what is left and waits for its first step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import cycle, islice
from pathlib import Path

import ray

from medgpt.cluster import ray_init
from medgpt.config.loading import load
from medgpt.config.stages import PretrainConfig
from medgpt.config.train import ClusterConfig
from medgpt.data.loader.plan import Plan
from medgpt.data.loader.stream import training_stream
from medgpt.runs import Run
from medgpt.sample_corpus.generator import CorpusGenerator
from medgpt.train.preparation import prepare

SHARES = (0.1, 0.9)
CONFIG = """
run.dir = "{run}"
[model.architecture]
hidden_size = 64
num_layers = 1
[tokenizer]
mode = "train"
max_train_mb = 1
[[data.sources]]
name = "short"
paths = ["{corpus}/*.jsonl"]
license = "Apache-2.0"
[data]
max_length = 512
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("runs/bench/resume"))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--probe", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.dir.absolute()
    config_file = folder / "config.toml"
    if options.probe is not None:
        probe(Run(str(folder / "run")), options.probe)
        return
    write_corpus(folder / "corpus", options.rows)
    config_file.write_text(CONFIG.format(run=folder / "run", corpus=folder / "corpus"), "utf-8")
    config = load(PretrainConfig, config_file)
    run = Run.open("pretrain", config, run_dir=config.run.dir, allow_changes=False)
    ray_init.start_local(os.cpu_count() or 1, loopback=False)  # the probes use it, too
    began = time.monotonic()
    data, plan = prepare(run, config, lambda *_: None)
    again = time.monotonic() - began
    print(f"{data['num_samples']:,} samples, {data['num_tokens']:,} tokens")
    print(f"tokenised in {data['time_s']:.0f} s, planned in {plan['time_s']:.1f} s, once")
    print(f"this preparation took {again:.1f} s")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    seconds: dict[float, list[float]] = {share: [] for share in SHARES}
    for _ in range(options.rounds):
        for share in SHARES:
            seconds[share].append(resume(folder, share))
            print(f"  resume at {share:.0%}: {seconds[share][-1]:.2f} s", flush=True)
    early, late = (statistics.median(seconds[share]) for share in SHARES)
    print(f"at 90 % / at 10 %: {late / early:.2f} ({late:.2f} s / {early:.2f} s, medians)")


def write_corpus(folder: Path, num_rows: int) -> None:
    """Write numbered sentences of the sample corpus to files of 100,000 rows."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    texts = [row["text"] for row in CorpusGenerator().documents()]
    sentences = [part for text in texts for part in text.split("\u3002") if 10 < len(part) < 60]
    numbered = enumerate(islice(cycle(sentences), num_rows))
    for number in range(-(-num_rows // 100_000)):
        lines = [
            json.dumps({"text": f"{i} {sentence}"}, ensure_ascii=False) + "\n"
            for i, sentence in islice(numbered, 100_000)
        ]
        (folder / f"{number:03d}.jsonl").write_text("".join(lines), "utf-8")


def resume(folder: Path, share: float) -> float:
    """Return the seconds until the first step after `share` of the epoch, in a new process."""
    command = [sys.executable, "-m", "tests.bench.resume_cost", "--dir", str(folder)]
    probed = subprocess.run(
        [*command, "--probe", str(share)], check=True, stdout=subprocess.PIPE, text=True
    )
    return float(probed.stdout)


def probe(run: Run, share: float) -> None:
    """Print the seconds until the remaining stream yields its first step."""
    ray_init.init_ray(ClusterConfig())
    began = time.monotonic()
    plan = Plan(run.plan.url, global_batch_size=64, max_steps=None)
    start = int(plan.num_steps * share)
    step = next(training_stream(plan, run.data.url, rank=0, world_size=1, start=start))
    assert step.step == start
    assert step.rows
    print(time.monotonic() - began)


if __name__ == "__main__":
    main()

"""A corpus ten times larger than its memory limit streams through bounded memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from medgpt.artifacts import Folder, commit
from medgpt.data.loader.plan import PlanSettings, make_plan
from medgpt.data.sources.records import Origin
from medgpt.data.tokenized.encode import EncodedSample
from medgpt.data.tokenized.shards import ShardWriter, data_version, write_index

ALLOWED_BYTES = 80 * 2**20  # Ray's smallest object store
BYTES_PER_TOKEN = 5  # an id and a target flag
SAMPLE_TOKENS = 2048
ROOT = Path(__file__).parents[3]
READER = """
import json, sys
import psutil, ray
from medgpt.data.loader.plan import Plan
from medgpt.data.loader.stream import training_stream

data, plan, allowed = sys.argv[1:]
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
         object_store_memory=int(allowed))

def resident():
    '''Bytes of this process and Ray's data tasks; what Ray needs for itself does not count.'''
    tasks = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::")]
    return sum(p.memory_info().rss - p.memory_info().shared for p in [psutil.Process(), *tasks])

plan = Plan(plan, global_batch_size=64, max_steps=None)
tokens, memory = 0, []
for step in training_stream(plan, data, rank=0, world_size=1, start=0):
    tokens += sum(len(row.input_ids) for row in step.rows)
    if step.step % (plan.num_steps // 20) == 0:
        memory.append(resident())
print(json.dumps({"tokens": tokens, "memory": memory}))
"""


def write_corpus(folder: Folder, num_tokens: int) -> None:
    rng = np.random.default_rng(0)
    names, files = [], []
    for shard in range(8):
        with ShardWriter(folder, f"train-{shard:05d}.parquet") as writer:
            for row in range(num_tokens // SAMPLE_TOKENS // 8):
                ids = rng.integers(0, 8000, SAMPLE_TOKENS, dtype=np.int32)
                writer.add(
                    EncodedSample(input_ids=ids, targets=ids > 0),
                    content_hash=f"{shard * 10**6 + row:032x}",
                    source=0,
                    origin=Origin(source="s", file="f", row=row),
                )
        names += [file.name for file in writer.files]
        files += writer.files
    index = [write_index(folder, "train", names), write_index(folder, "validation", [])]
    commit(folder, [*files, *index[0], *index[1]])


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_memory_stays_bounded_for_a_corpus_larger_than_the_limit(tmp_path: Path) -> None:
    data, plan = Folder(str(tmp_path / "data")), str(tmp_path / "plan")
    num_tokens = 10 * ALLOWED_BYTES // BYTES_PER_TOKEN
    write_corpus(data, num_tokens)
    order = PlanSettings(
        data_version(data.url), SAMPLE_TOKENS, seed=0, epochs=1, weights=None, max_rows=None
    )
    make_plan(plan, data.url, order)
    reader = subprocess.run(
        [sys.executable, "-c", READER, data.url, plan, str(ALLOWED_BYTES)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert reader.returncode == 0, reader.stderr[-2000:]
    seen = json.loads(reader.stdout.splitlines()[-1])
    assert seen["tokens"] >= 0.99 * num_tokens
    first, second = np.split(np.array(seen["memory"][:20]), 2)
    assert second.max() - first.max() < ALLOWED_BYTES / 2, seen["memory"]

"""DPO from config to finished run, and resumed, on a local Ray."""

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medgpt.artifacts import committed
from medgpt.config.dpo import DPOConfig
from medgpt.config.loading import validate
from medgpt.runs import Run
from medgpt.sample_corpus.generator import CorpusGenerator
from medgpt.sample_corpus.preference_pairs import preference_pairs
from medgpt.stages.dpo import run_dpo
from medgpt.train.dpo import CHECKPOINT_PREFIX
from tests.train.tiny_configs import source_settings

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = islice(
        (row for row in preference_pairs(CorpusGenerator()) if row["kind"] == "vague"), 80
    )
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return file


def dpo_config(run_dir: Path, pairs: Path, base: Path, **sections: Any) -> DPOConfig:
    tree = {
        "run": {"dir": str(run_dir), "seed": 1},
        "model": {"name": str(base)},
        "data": {
            "sources": [source_settings("pairs", pairs)],
            "max_length": 384,
            "validation_share": 0.1,
        },
        "train": {
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "max_steps": 6,
            "checkpoint_every": 3,
            "eval_every": 3,
        },
        "optimizer": {"learning_rate": 1e-3},
        "cluster": {"num_workers": 2},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return validate(DPOConfig, tree)


@pytest.fixture(scope="module")
def trained(ray_session: None, pairs: Path, base: Path, tmp_path_factory: Any) -> Run:
    return run_dpo(dpo_config(tmp_path_factory.mktemp("runs") / "dpo", pairs, base))


def series(run: Run, name: str) -> list[float]:
    return [line[name] for line in run.metrics() if name in line]


def test_dpo_starts_at_the_reference_and_learns_the_preferences(trained: Run, base: Path) -> None:
    losses = series(trained, "train/loss")
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses[-1] < 0.6
    assert series(trained, "validation/accuracy")[-1] > 0.8
    weights = load_file(Path(trained.model.url) / "model.safetensors")
    before = load_file(base / "model.safetensors")
    assert before.keys() == weights.keys()
    assert any(not torch.equal(weights[name], before[name]) for name in weights)
    assert not trained.model.exists("training_args.bin")
    assert "<svg" in trained.folder.read_text("report.html")


def test_dpo_resumes_from_the_newest_complete_checkpoint(
    trained: Run, pairs: Path, base: Path, tmp_path: Path
) -> None:
    assert trained.checkpoint_steps(CHECKPOINT_PREFIX) == [3, 6]
    folder = Path(shutil.copytree(trained.folder.url, tmp_path / "run"))
    (folder / "checkpoints" / f"{CHECKPOINT_PREFIX}6" / "manifest.json").unlink()  # half-written
    shutil.rmtree(folder / "model")
    (folder / "report.html").unlink()
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    (folder / "manifest.json").write_text(json.dumps(manifest | {"finished": False}), "utf-8")

    resumed = run_dpo(dpo_config(folder, pairs, base))

    assert resumed.manifest["attempt"] == 2
    assert [line["attempt"] for line in resumed.metrics()][-3:] == [2, 2, 2]
    assert series(resumed, "train/loss") == pytest.approx(series(trained, "train/loss"), abs=1e-5)
    assert committed(resumed.checkpoints / f"{CHECKPOINT_PREFIX}6", verify=True)


def test_kto_trains_adapters(ray_session: None, pairs: Path, base: Path, tmp_path: Path) -> None:
    config = dpo_config(
        tmp_path / "run",
        pairs,
        base,
        dpo={"loss": ["kto"]},
        model={"name": str(base), "lora": {"rank": 4}},
        engine={"zero_stage": 3},
        train={"max_steps": 2},
        cluster={"num_workers": 1},
    )
    run = run_dpo(config)

    assert run.model.exists("adapter_model.safetensors")
    assert not run.model.exists("model.safetensors")
    assert len(series(run, "train/loss")) == 2

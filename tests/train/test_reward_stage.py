"""The reward stage from config to finished run, on a local Ray."""

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from medgpt.config.loading import validate
from medgpt.config.reward_model import RewardModelConfig
from medgpt.data.loader.collate import preference_batch
from medgpt.data.loader.epoch_order import VALIDATION
from medgpt.data.loader.plan import Plan
from medgpt.data.loader.stream import read_first_rows
from medgpt.models.tokenizer import load_tokenizer
from medgpt.models.tokenizer_compat import tokenizer_fingerprint
from medgpt.models.value_model import RewardModelInfo, last_token_values, load_value_model
from medgpt.runs import Run
from medgpt.sample_corpus.generator import CorpusGenerator
from medgpt.sample_corpus.preference_pairs import preference_pairs
from medgpt.stages.train import run_reward
from medgpt.train.reward_eval import REWARD_EVAL_FILE
from tests.train.audit_log import assert_every_chunk_once

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
BAD_ROWS = [
    {"prompt": "问", "chosen": "同", "rejected": "同"},
    {"prompt": "问", "chosen": "答", "rejected": ""},
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 pairs of the sample corpus and two bad rows."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    chosen = list(
        islice((row for row in preference_pairs(CorpusGenerator()) if row["kind"] == "vague"), 120)
    )
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in [*chosen, *BAD_ROWS]]
    file.write_text("".join(lines), "utf-8")
    return file


def reward_config(run_dir: Path, pairs: Path, base: Path, **sections: Any) -> RewardModelConfig:
    source = {"name": "pairs", "paths": [str(pairs)], "license": "Apache-2.0"}
    tree = {
        "run": {"dir": str(run_dir), "seed": 1},
        "model": {"name": str(base)},
        "data": {
            "sources": [source],
            "max_length": 384,
            "validation_share": 0.15,
            "max_malformed_share": 0.05,
        },
        "train": {
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "checkpoint_every": 5,
            "eval_every": 5,
            "audit": True,
        },
        "optimizer": {"learning_rate": 3e-3},
        "engine": {"zero_stage": 1},
        "cluster": {"num_workers": 2},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return validate(RewardModelConfig, tree)


@pytest.fixture(scope="module")
def trained(ray_session: None, pairs: Path, base: Path, tmp_path_factory: Any) -> Run:
    return run_reward(reward_config(tmp_path_factory.mktemp("runs") / "reward", pairs, base))


def test_the_reward_model_learns_the_preferences_and_uses_every_prompt_once(trained: Run) -> None:
    metrics = trained.metrics()
    accuracy = [m["reward/accuracy"] for m in metrics if "reward/accuracy" in m]
    held_out = [m["validation/accuracy"] for m in metrics if "validation/accuracy" in m]
    assert accuracy[-1] > 0.8
    assert held_out[-1] > 0.8
    assert_every_chunk_once(trained)
    data = trained.manifest["data"]
    assert data["num_samples"] == data["num_chunks"]
    assert data["sources"]["pairs"]["set_aside"] == {
        "two answers are equal": 1,
        "kind pairs: column rejected is empty": 1,
    }


def chosen_scores(run: Run, model: Any) -> torch.Tensor:
    plan = Plan(run.plan.url, global_batch_size=8, max_steps=None)
    rows = read_first_rows(plan, run.data.url, epoch=0, rank=0, world_size=1, limit=10_000)
    batch = preference_batch(rows)
    with torch.no_grad():
        return last_token_values(model(batch.packed), batch.packed)[batch.better]


def test_the_exported_scores_are_normalized_on_the_chosen_answers(trained: Run, base: Path) -> None:
    folder = trained.model.url
    model, score = load_value_model(folder)
    scores = chosen_scores(trained, model)
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert score.normalised_on == "chosen"
    assert score.speech == tokenizer_fingerprint(load_tokenizer(str(base)))
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    assert plain.config.num_labels == 1


def test_the_report_shows_accuracy_by_source_and_length(trained: Run) -> None:
    evaluation = trained.folder.read_json(REWARD_EVAL_FILE)
    plan = Plan(trained.plan.url, global_batch_size=8, max_steps=None)
    held_out = read_first_rows(
        plan, trained.data.url, epoch=VALIDATION, rank=0, world_size=1, limit=10_000
    )
    assert evaluation["pairs"] == len(held_out) > 5
    assert evaluation["accuracy"] > 0.8
    assert sum(evaluation["leads"]["counts"]) == evaluation["pairs"]
    for slices in (evaluation["by_source"], evaluation["by_length"]):
        assert sum(entry["pairs"] for entry in slices) == evaluation["pairs"]
    html = trained.folder.read_text("report.html")
    assert f"{100 * evaluation['accuracy']:.1f} % are in the right order" in html
    assert "Length of the better answer minus that of the worse" in html
    assert html.count("<svg") >= 4


def test_a_resumed_reward_run_has_the_losses_of_an_uninterrupted_one(
    trained: Run, pairs: Path, base: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained.folder.url, tmp_path / "run"))
    newest = trained.newest_checkpoint()
    assert newest is not None
    shutil.rmtree(folder / "checkpoints" / Path(newest[0].url).name)
    for name in ("model", REWARD_EVAL_FILE, "report.html"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    (folder / "manifest.json").write_text(json.dumps(manifest | {"finished": False}), "utf-8")
    text = (folder / "config.toml").read_text("utf-8")
    (folder / "config.toml").write_text(text.replace(trained.folder.url, str(folder)), "utf-8")

    again = run_reward(reward_config(folder, pairs, base))

    def losses(run: Run) -> dict[int, float]:
        return {m["step"]: m["train/loss"] for m in run.metrics() if "train/loss" in m}

    redone = {m["step"] for m in again.metrics() if m["attempt"] == 2 and "train/loss" in m}
    assert redone == {step for step in losses(trained) if step > max(losses(trained)) - len(redone)}
    assert losses(again) == pytest.approx(losses(trained), abs=1e-6)
    first, second = (RewardModelInfo.read(Path(run.model.url)) for run in (trained, again))
    assert first is not None
    assert second is not None
    assert second.mean == pytest.approx(first.mean, abs=1e-6)

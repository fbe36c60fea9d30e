"""Stages that train adapters on a quantized base, from config to merged model, on a local Ray."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from medgpt.artifacts import committed
from medgpt.cli import app
from medgpt.config.dpo import DPOConfig
from medgpt.config.loading import validate
from medgpt.runs import Run
from medgpt.sample_corpus.generator import CorpusGenerator
from medgpt.sample_corpus.preference_pairs import preference_pairs
from medgpt.stages.dpo import run_dpo
from medgpt.stages.train import run_sft
from tests.train.tiny_configs import sft_config, source_settings

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = {"max_steps": 4, "checkpoint_every": 2, "eval_every": 2, "global_batch_size": 8}
STEPS |= {"micro_batch_size": 2}


def quantized(base: Path, kind: str) -> dict[str, Any]:
    return {"name": str(base), "lora": {"rank": 4, "quantize": kind}}


def assert_merges(run: Run, base: Path, out: Path) -> None:
    assert run.finished
    assert committed(run.model, verify=True) is not None
    assert run.model.read_json("adapter_config.json")["base_model_name_or_path"] == str(base)
    merged = CliRunner().invoke(app, ["merge", run.folder.url, str(out)])
    assert merged.exit_code == 0, merged.output
    assert "dequantized" in merged.output
    AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_fine_tuning(
    ray_session: None, base: Path, tiny_corpus: Path, tmp_path: Path, kind: str
) -> None:
    report = {"prompts": ["感冒有哪些症状?"], "max_new_tokens": 8}
    sections = {"model": quantized(base, kind), "train": STEPS, "report": report}
    run = run_sft(sft_config(tmp_path / "sft", tiny_corpus, base, **sections))
    assert run.folder.exists("samples.json")
    assert_merges(run, base, tmp_path / "out")


def test_dpo(ray_session: None, base: Path, tmp_path: Path) -> None:
    rows = islice(
        (row for row in preference_pairs(CorpusGenerator()) if row["kind"] == "vague"), 40
    )
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    tree = {"run": {"dir": str(tmp_path / "dpo")}, "model": quantized(base, "nf4"), "train": STEPS}
    tree["data"] = {"sources": [source_settings("pairs", pairs)], "max_length": 384}
    run = run_dpo(validate(DPOConfig, tree))
    losses = [line["train/loss"] for line in run.metrics() if "train/loss" in line]
    assert losses[0] == pytest.approx(0.693147, abs=1e-4)
    assert_merges(run, base, tmp_path / "out")

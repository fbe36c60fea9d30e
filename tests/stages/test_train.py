"""A stage from config to finished run, on a real local Ray."""

import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
from typer.testing import CliRunner

from medgpt.artifacts import committed
from medgpt.cli import app
from medgpt.config.loading import load
from medgpt.config.stages import PretrainConfig
from medgpt.models.generate import generate_greedy, load_for_generation
from medgpt.runs import Run
from medgpt.stages.train import run_pretrain, run_sft
from tests.train.audit_log import assert_every_chunk_once, chunks_by_epoch
from tests.train.tiny_configs import TINY_ARCHITECTURE, pretrain_config, sft_config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
EXTERNAL = re.compile(r"""(src|href)\s*=\s*["'](https?:)?//|url\(\s*["']?(https?:)?//|@import""")


def validation_losses(run: Run) -> list[float]:
    return [m["validation/loss"] for m in run.metrics() if "validation/loss" in m]


def test_a_run_directory_holds_the_documented_files(pretrained: Run) -> None:
    assert {
        "config.toml",
        "manifest.json",
        "metrics.jsonl",
        "checkpoints",
        "model",
        "report.html",
        "tensorboard",
        "audit",
        "data",
        "tokenizer",
    } <= set(pretrained.folder.names())


def test_the_config_of_a_run_is_complete_and_loads(pretrained: Run, tiny_corpus: Path) -> None:
    path = Path(pretrained.folder.url)
    config = load(PretrainConfig, path / "config.toml")
    assert config == pretrain_config(path, tiny_corpus)
    assert pretrained.config["optimizer"]["eps"] == 1e-8  # a default, written out


def test_the_manifest_records_versions_data_and_hardware(pretrained: Run) -> None:
    manifest = pretrained.manifest
    assert manifest["versions"]["torch"] == torch.__version__
    assert {"medgpt", "python", "ray", "deepspeed", "transformers"} <= manifest["versions"].keys()
    assert re.fullmatch("[0-9a-f]{40}", manifest["git_sha"])
    assert manifest["seed"] == 1
    assert manifest["parents"] == []
    assert manifest["hardware"]["cpus"] >= 1
    assert manifest["timings"]["training_s"] > 0
    assert manifest["stage"] == "pretrain"
    assert manifest["finished"] is True
    assert manifest["world_size"] == 2
    assert manifest["attempt"] == 1


def test_every_row_is_trained_held_out_or_set_aside(pretrained: Run) -> None:
    data = pretrained.manifest["data"]
    account = data["sources"]["pretrain"]
    set_aside = sum(account["set_aside"].values())
    assert account["rows"] == 300
    assert account["rows"] == account["train"] + account["validation"] + set_aside
    assert data["num_samples"] == account["train"]
    assert data["validation"]["num_samples"] == account["validation"] > 0
    assert data["num_chunks"] > data["num_samples"]  # some documents are longer than a row
    rejected = pretrained.folder / "rejected"
    lines = [line for name in rejected.names() for line in rejected.read_text(name).splitlines()]
    assert len(lines) == set_aside


def test_metrics_have_a_line_per_step_with_time(pretrained: Run) -> None:
    lines = [json.loads(x) for x in pretrained.folder.read_text("metrics.jsonl").splitlines()]
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == list(range(1, len(steps) + 1))
    times = [line["time_s"] for line in lines]
    assert times == sorted(times)
    # every chunk is trained once an epoch; consecutive chunks share a token
    data = pretrained.manifest["data"]
    tokens = data["num_tokens"] + data["num_chunks"] - data["num_samples"]
    trained = [line for line in lines if "train/loss" in line]
    assert sum(line["train/tokens"] for line in trained) == 2 * tokens
    assert sum(line["train/sequences"] for line in trained) == 2 * data["num_chunks"]
    assert sum(line["train/target_tokens"] for line in trained) == 2 * (
        data["num_tokens"] - data["num_samples"]
    )


def test_tensorboard_shows_the_same_numbers(pretrained: Run) -> None:
    events = EventAccumulator(pretrained.folder.path("tensorboard"), {"scalars": 0})
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    logged = {m["step"]: m["train/loss"] for m in pretrained.metrics() if "train/loss" in m}
    assert shown == pytest.approx(logged, rel=1e-6)


def test_validation_loss_falls(pretrained: Run) -> None:
    losses = {
        m["step"]: m["validation/loss"] for m in pretrained.metrics() if "validation/loss" in m
    }
    last = max(losses)
    assert [step for step in losses if step % 10] in ([], [last])
    assert losses[last] < losses[0] - 0.5
    assert losses[last] < math.log(800) - 0.5  # of 800 tokens, all as likely


def test_the_last_checkpoints_and_the_best_are_complete(pretrained: Run) -> None:
    steps = pretrained.checkpoint_steps()
    assert 2 <= len(steps) <= 3
    for step in steps:
        assert committed(pretrained.checkpoint(step), verify=True), step
    newest = pretrained.newest_checkpoint()
    assert newest is not None
    position = newest[1]["position"]
    assert position["step"] == steps[-1] == pretrained.metrics()[-1]["step"]
    assert position["best_step"] in steps


def test_every_chunk_is_trained_exactly_once_an_epoch(pretrained: Run) -> None:
    assert_every_chunk_once(pretrained)
    by_epoch = chunks_by_epoch(pretrained)
    assert sorted(by_epoch) == [0, 1]
    assert set(by_epoch[0]) == set(by_epoch[1])
    assert by_epoch[0] != by_epoch[1]  # in another order


def test_the_model_loads_where_medgpt_is_not_installed(pretrained: Run, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['medgpt'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "folder = sys.argv[1]\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "ids = tokenizer('糖尿病的', return_tensors='pt')\n"
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=8)[0]))\n"
    )
    command = [sys.executable, "-c", code, pretrained.model.url]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("糖尿病的")
    assert "MISSING" not in result.stderr
    assert "UNEXPECTED" not in result.stderr


def test_the_report_of_a_run_is_self_contained(pretrained: Run) -> None:
    html = pretrained.folder.read_text("report.html")
    assert not EXTERNAL.search(html)
    assert html.count("<svg") >= 3
    assert "validation" in html
    assert "zero_stage = 2" in html


def test_a_finished_run_is_not_trained_again(
    pretrained: Run, tiny_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = time.monotonic()
    again = run_pretrain(pretrain_config(Path(pretrained.folder.url), tiny_corpus))
    assert time.monotonic() - before < 2
    assert "is finished; choose another run.dir to train again" in capsys.readouterr().out
    assert again.manifest == pretrained.manifest


def test_fine_tuning_continues_from_the_pretrained_model(
    pretrained: Run, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = sft_config(
        tmp_path / "sft",
        tiny_corpus,
        Path(pretrained.model.url),
        train={"neftune_alpha": 1.0},
        report={"prompts": ("感冒有哪些症状?",), "max_new_tokens": 8},
    )
    run = run_sft(config)
    assert run.manifest["parents"] == [pretrained.folder.url]
    losses = validation_losses(run)
    assert losses[-1] < losses[0]
    assert_every_chunk_once(run)

    model, tokenizer = load_for_generation(run.model.url, torch.device("cpu"))
    texts = generate_greedy(
        model, tokenizer, ["感冒有哪些症状?"], are_questions=True, max_new_tokens=8
    )
    assert run.folder.read_json("samples.json") == [{"prompt": "感冒有哪些症状?", "text": texts[0]}]
    assert tokenizer.chat_template is not None
    said = CliRunner().invoke(
        app, ["chat", run.folder.url, "--max-new-tokens", "4"], input="你好\n\n"
    )
    assert said.exit_code == 0, said.output


def test_adapters_train_and_merge_into_the_base(
    pretrained: Run, tiny_corpus: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(pretrained.model.url, tmp_path / "base"))
    config = sft_config(
        tmp_path / "lora",
        tiny_corpus,
        base,
        model={"lora": {"rank": 4}},
        train={"max_steps": 4},
        cluster={"num_workers": 1},
    )
    run = run_sft(config)
    assert "adapter_model.safetensors" in run.model.names()
    assert "model.safetensors" not in run.model.names()
    out = tmp_path / "merged"
    result = CliRunner().invoke(app, ["merge", run.folder.url, str(out)])
    assert result.exit_code == 0, result.output
    merged = AutoModelForCausalLM.from_pretrained(out)
    before = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("感冒有哪些症状", return_tensors="pt").input_ids
    with torch.no_grad():
        vocabulary = before.config.vocab_size
        change = merged(ids).logits[..., :vocabulary] - before(ids).logits
    assert 1e-5 < change.abs().max() < 10


def test_masked_pretraining_makes_a_masked_language_model(
    ray_session: None, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = pretrain_config(
        tmp_path / "mlm",
        tiny_corpus,
        model={"architecture": {**TINY_ARCHITECTURE, "kind": "bert"}},
        objective={"kind": "mlm"},
        cluster={"num_workers": 1},
    )
    run = run_pretrain(config)
    losses = validation_losses(run)
    assert losses[-1] < losses[0] - 0.3
    targets = sum(m.get("train/target_tokens", 0) for m in run.metrics())
    tokens = sum(m.get("train/tokens", 0) for m in run.metrics())
    assert 0.10 < targets / tokens < 0.17  # 15 % of the words, none of the special tokens
    model = AutoModelForMaskedLM.from_pretrained(run.model.url)
    tokenizer = AutoTokenizer.from_pretrained(run.model.url)
    ids = tokenizer("糖尿[MASK]的症状", return_tensors="pt")
    assert tokenizer.mask_token_id in ids.input_ids
    assert model(**ids).logits.shape[-1] == len(tokenizer)


def test_zero_3_trains_a_base_model_that_no_worker_holds_whole(
    pretrained: Run, tiny_corpus: Path, tmp_path: Path
) -> None:
    sections = {
        "model": {"architecture": None, "name": pretrained.model.url},
        "tokenizer": {"mode": "base"},
        "train": {"max_steps": 3, "eval_every": 3},
    }
    run = run_pretrain(
        pretrain_config(tmp_path / "zero3", tiny_corpus, engine={"zero_stage": 3}, **sections)
    )
    begin = validation_losses(run)[0]
    end = validation_losses(pretrained)[-1]
    assert begin == pytest.approx(end, abs=1e-5)  # the same weights on the same held-out rows
    model = AutoModelForCausalLM.from_pretrained(run.model.url)
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(pretrained.model.url).parameters()
    )

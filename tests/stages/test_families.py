"""Whole commands on models that are not medgpt's own: fine-tune, evaluate, chat, PPO."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medgpt.config.pools import ROLES
from medgpt.data.loader.collate import causal_batch
from medgpt.data.loader.epoch_order import VALIDATION
from medgpt.data.loader.plan import Plan
from medgpt.data.loader.stream import read_first_rows
from medgpt.runs import Run
from medgpt.stages.chat import run_chat
from medgpt.stages.evaluate import run_eval
from medgpt.stages.merge import merge_adapter
from medgpt.stages.ppo import train_ppo
from medgpt.stages.train import run_sft
from tests.models.cells import loss_of_each_row_alone, plain_model
from tests.models.families import FAMILIES
from tests.rlhf.cases import ppo_config
from tests.stages.test_evaluate import eval_config
from tests.train.tiny_configs import sft_config

HALVES = tuple(f"pools.{role}.cpus_per_worker=0.5" for role in ROLES)
pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


def reported_and_alone(run: Run, name: str, model: Path) -> tuple[float, float]:
    """Return the run's last held-out loss, and plain transformers' on each held-out text alone."""
    plan = Plan(run.plan.url, global_batch_size=1, max_steps=None)
    rows = read_first_rows(plan, run.data.url, epoch=VALIDATION, rank=0, world_size=1, limit=10**6)
    lines = [line for line in run.metrics() if "validation/loss" in line]
    alone = loss_of_each_row_alone(plain_model(FAMILIES[name], model), causal_batch(rows))
    return lines[-1]["validation/loss"], alone


def fine_tune(name: str, base: Path, folder: Path, corpus: Path, **model: Any) -> Run:
    config = sft_config(
        folder,
        corpus,
        base,
        model=model,
        data={"max_length": 480, "validation_share": 0.1},
        train={"max_steps": 6, "eval_every": 3, "checkpoint_every": 6},
    )
    return run_sft(config)


def test_gemma_goes_through_sft_evaluation_chat_and_ppo(
    ray_session: None,
    tiny_corpus: Path,
    family_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SentencePiece's bytes, an embedding scale, windows, two end tokens."""
    run = fine_tune("gemma-3", family_folder("gemma-3"), tmp_path / "sft", tiny_corpus)
    model = Path(run.model.url)
    reported, alone = reported_and_alone(run, "gemma-3", model)
    assert reported == pytest.approx(alone, abs=2e-4)

    tasks = {"nll": [{"general": True, "limit": 2}]}
    scores = eval_config(tmp_path / "eval", model, **tasks)
    assert run_eval(scores).folder.exists("results.json")

    questions = iter(["什么是高血压?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(questions))
    capsys.readouterr()
    run_chat(str(tmp_path / "sft"), 20, 0.0)
    assert len(capsys.readouterr().out.splitlines()) >= 3

    source = f"{{name='s',paths=['{tiny_corpus}/sft'],license='Apache-2.0'}}"
    data = f"data={{max_length=320,sources=[{source}]}}"
    ppo = train_ppo(ppo_config(tmp_path, model, data, "ppo.max_iterations=1", *HALVES))
    [line] = [line for line in ppo.metrics() if "rollout/logprob_gap" in line]
    assert line["rollout/logprob_gap"] < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-2", "bloom", "gpt-oss"])
def test_a_lora_run_reports_the_loss_that_plain_transformers_has_after_the_merge(
    name: str,
    ray_session: None,
    tiny_corpus: Path,
    family_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    lora = {"lora": {"rank": 4}}
    run = fine_tune(name, family_folder(name), tmp_path / "sft", tiny_corpus, **lora)
    merge_adapter(str(tmp_path / "sft"), tmp_path / "merged")
    reported, alone = reported_and_alone(run, name, tmp_path / "merged")
    assert reported == pytest.approx(alone, abs=2e-4)

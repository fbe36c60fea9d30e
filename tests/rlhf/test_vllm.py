"""vLLM samples like our own engine, also after it received new weights."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from medgpt.models.decode import TokenGenerator
from tests.models.tiny_models import model_with_tokenizer

ROOT = Path(__file__).parents[2]
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [9] * 20]
ENDS = [4, 30]


@pytest.fixture(scope="module")
def python() -> str:
    """Python of an environment with vLLM."""
    python = os.environ.get("MEDGPT_VLLM_PYTHON")
    if python is None and importlib.util.find_spec("vllm"):
        python = sys.executable
    if python is None:
        pytest.skip(
            "no vLLM here; make an environment as jobs/constraints-vllm.txt says and set "
            "MEDGPT_VLLM_PYTHON to its python"
        )
    return python


def fresh(folder: Path, seed: int) -> PreTrainedModel:
    """A model whose heads are as wide as vLLM's smallest."""
    model, tokenizer = model_with_tokenizer(["高血压是常见的慢性病。"] * 50, hidden_size=128)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.set_attn_implementation("sdpa")
    return model.eval()


@pytest.mark.slow
def test_vllm_agrees_with_transformers_before_and_after_a_weight_sync(python: str, tmp_path: Path):
    models = [fresh(tmp_path / str(seed), seed) for seed in (1, 2)]
    request = {"folder": str(tmp_path / "1"), "other": str(tmp_path / "2")}
    request |= {"prompts": PROMPTS, "stop_token_ids": ENDS}
    command = [python, "-m", "tests.rlhf.vllm_run", json.dumps(request)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, list[dict[str, Any]]] = json.loads(done.stdout.splitlines()[-1])
    for model, rows in zip(models, (answer["first"], answer["second"]), strict=True):
        expected = TokenGenerator(model).generate(
            PROMPTS, [0, 1, 2], max_new_tokens=12, temperature=0.0, stop_token_ids=ENDS
        )
        assert [row["ids"] for row in rows] == [row.ids for row in expected]
        assert [row["finished"] for row in rows] == [row.finished for row in expected]
        for row, other in zip(rows, expected, strict=True):
            assert row["logprobs"] == pytest.approx(other.logprobs, abs=1e-4)
    assert answer["first"] != answer["second"]
    assert answer["alone"] == [answer["sampled"][1]]
    for prompt, row in zip(PROMPTS, answer["sampled"], strict=True):
        assert row["logprobs"] == pytest.approx(under(models[1], prompt, row["ids"], 0.7), abs=1e-4)


@torch.no_grad()
def under(
    model: PreTrainedModel, prompt: list[int], ids: list[int], temperature: float
) -> list[float]:
    """Log-probabilities of `ids` from a plain forward."""
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()

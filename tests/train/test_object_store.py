"""A stage whose base model and run directory are in an S3 bucket."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from medgpt.artifacts import Folder, committed
from medgpt.cli import app
from medgpt.config.loading import validate
from medgpt.config.stages import SFTConfig
from medgpt.models import fetch
from medgpt.models.generate import generate_greedy
from medgpt.runs import Run
from medgpt.stages.train import run_sft
from tests.train.tiny_configs import pretrain_settings, source_settings

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
QUESTION = "感冒有哪些症状?"


@pytest.fixture
def base_run(pretrained: Run, s3: str) -> Iterator[str]:
    """The pretrained run in the bucket."""
    folder = Folder(f"{s3}/pretrain")
    folder.fs.put(f"{pretrained.folder.root}/", f"{folder.root}/", recursive=True)
    yield folder.url
    for uri in (f"{folder.url}/model", f"{s3}/sft/model"):
        shutil.rmtree(fetch.local_copy(uri))


def test_adapters_on_an_extended_vocabulary_from_bucket_to_bucket(
    base_run: str, s3: str, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = pretrain_settings(Path("unused"), tiny_corpus)
    tree["run"]["dir"] = f"{s3}/sft"
    tree["model"] = {"name": f"{base_run}/model", "lora": {"rank": 4}}
    tree["tokenizer"] = {"mode": "extend", "new_tokens": 50}
    tree["data"] |= {"sources": [source_settings("sft", tiny_corpus / "sft")], "max_length": 256}
    tree["train"] |= {"max_steps": 4, "checkpoint_every": 2}
    tree["cluster"] = {"num_workers": 1}
    tree["report"] = {"prompts": [QUESTION], "max_new_tokens": 8}
    config = validate(SFTConfig, tree)

    run = run_sft(config)

    assert run.finished
    assert run.manifest["parents"] == [base_run]
    assert run.newest_checkpoint() is not None
    assert [m["step"] for m in run.metrics() if "train/loss" in m] == [1, 2, 3, 4]
    assert committed(run.model, verify=True) is not None
    adapter = json.loads(run.model.read_text("adapter_config.json"))
    assert adapter["base_model_name_or_path"] == f"{base_run}/model"  # for merging later
    vocabulary = run.manifest["vocabulary"]
    assert vocabulary["num_new_tokens"] == 50
    shift = vocabulary["loss"]["after"] - vocabulary["loss"]["before"]
    assert shift > 0
    assert f"({shift:+.4f} from the changed softmax)" in capsys.readouterr().out
    assert f"({shift:+.4f} nats per token)" in run.folder.read_text("report.html")

    out = tmp_path / "merged"
    merged = CliRunner().invoke(app, ["merge", run.folder.url, str(out)])
    assert merged.exit_code == 0, merged.output
    model, tokenizer = (x.from_pretrained(out) for x in (AutoModelForCausalLM, AutoTokenizer))
    (text,) = generate_greedy(
        model.eval(), tokenizer, [QUESTION], are_questions=True, max_new_tokens=8
    )
    assert run.folder.read_json("samples.json") == [{"prompt": QUESTION, "text": text}]
    chat = ["chat", run.folder.url, "--max-new-tokens", "8"]
    chat_result = CliRunner().invoke(app, chat, input=f"{QUESTION}\n\n")
    assert chat_result.exit_code == 0, chat_result.output
    assert text in chat_result.output

"""Bad input gets a clear error, and no row is lost silently."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from transformers import MistralConfig

from medgpt.config.base import ConfigError
from medgpt.config.stages import PretrainConfig, TrainStageConfig
from medgpt.runs import Run
from medgpt.stages import train as stage_module
from medgpt.stages.train import train_stage
from medgpt.train.preparation import prepare
from tests.train.tiny_configs import pretrain_config, sft_config, source_settings

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_session")]
PRIVATE_TEXT = "张三的秘密"  # in every bad row; errors must not quote it


@pytest.fixture(autouse=True)
def start_workers_late(monkeypatch: pytest.MonkeyPatch) -> int:
    """Do not start workers early. Returns the data size below which they otherwise do."""
    size = stage_module.EAGER_START_MAX_BYTES
    monkeypatch.setattr(stage_module, "EAGER_START_MAX_BYTES", 0)
    return size


def error_of(config: TrainStageConfig) -> str:
    """Return the error of the stage, which must not start workers."""
    stage = "pretrain" if isinstance(config, PretrainConfig) else "sft"
    with pytest.raises(ConfigError) as error:
        train_stage(stage, config)
    assert PRIVATE_TEXT not in str(error.value)
    run = Run(config.run.dir)
    assert not run.finished
    assert "attempt" not in run.manifest or run.manifest["attempt"] == 0  # no worker ran
    return str(error.value)


def prepare_source(config: TrainStageConfig) -> dict[str, Any]:
    """Return the row counts of the only source after tokenizing."""
    stage = "pretrain" if isinstance(config, PretrainConfig) else "sft"
    run = Run.open(stage, config, run_dir=config.run.dir, allow_changes=False)
    (account,) = prepare(run, config, lambda *_: None).data["sources"].values()
    return account


def rejected_rows(config: TrainStageConfig) -> list[dict[str, Any]]:
    folder = Run(config.run.dir).folder / "rejected"
    return [json.loads(x) for name in folder.names() for x in folder.read_text(name).splitlines()]


def data_section(path: Path, **more: Any) -> dict[str, Any]:
    return {"sources": [source_settings("bad", path)], **more}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), "utf-8")
    return path


def documents(count: int) -> list[dict[str, Any]]:
    return [{"text": f"第{i}号文档说的是高血压的常见症状与检查方法。"} for i in range(count)]


def dialogue(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


GOOD_DIALOGUE = dialogue(("user", "什么是高血压?"), ("assistant", "血压持续升高。"))


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("none.jsonl", "no such file"),
        ("*.jsonl", "no such file"),
        ("", "no file of a known format"),
    ],
    ids=["missing file", "empty glob", "empty folder"],
)
def test_paths_without_files_are_refused_before_anything_starts(
    tmp_path: Path, name: str, rule: str
) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / name
    config = pretrain_config(tmp_path / "run", tmp_path, data=data_section(path))
    message = error_of(config)
    assert f"data.sources bad paths='{path}': {rule}" in message
    assert not (tmp_path / "run/tokenizer").exists()


@pytest.mark.parametrize("lines", [True, False], ids=["line", "file"])
def test_a_text_with_broken_encoding_is_rejected_with_file_and_row(
    tmp_path: Path, base: Path, lines: bool
) -> None:
    good = "高血压是常见的慢性病。\n".encode() * 20
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.txt").write_bytes(good)
    bad = tmp_path / "data/b.txt"
    bad.write_bytes(good + PRIVATE_TEXT.encode() + b"\xff\xfe\xfa\x80\n" + good)
    texts = {**source_settings("bad", tmp_path / "data"), "lines": lines}
    message = error_of(base_config(tmp_path, base, sources=[texts]))
    assert f"data.sources bad: 1 of {61 if lines else 2} rows are malformed" in message
    assert "broken encoding" in message
    (reject,) = rejected_rows(base_config(tmp_path, base))
    assert (reject["file"], reject["row"]) == (str(bad), 21 if lines else 1)
    assert PRIVATE_TEXT not in json.dumps(reject, ensure_ascii=False)


def test_a_truncated_parquet_shard_is_refused_or_set_aside(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in "abc":
        table = pa.table({"text": [row["text"] for row in documents(40)]})
        pq.write_table(table, tmp_path / f"data/{name}.parquet")
    broken = tmp_path / "data/b.parquet"
    broken.write_bytes(broken.read_bytes()[:-20])
    config = pretrain_config(tmp_path / "run", tmp_path, data=data_section(tmp_path / "data"))
    message = error_of(config)
    assert "1 of 3" in message
    assert str(broken) in message

    tolerant = pretrain_config(
        tmp_path / "tolerant",
        tmp_path,
        data=data_section(tmp_path / "data", max_malformed_share=0.5),
    )
    account = prepare_source(tolerant)
    assert account["train"] + account["validation"] == 80
    assert account["rows"] == 80 + sum(account["set_aside"].values())
    assert [reject["file"] for reject in rejected_rows(tolerant)] == [str(broken)]


def test_rows_of_the_wrong_kind_are_counted_and_refused(tmp_path: Path, base: Path) -> None:
    path = write_rows(tmp_path / "data.jsonl", [{"text": PRIVATE_TEXT + "高血压"}] * 30)
    message = error_of(sft_config(tmp_path / "run", tmp_path, base, data=data_section(path)))
    assert "data.sources bad: 30 of 30 rows are malformed" in message
    assert str(tmp_path / "run/rejected") in message


@pytest.mark.parametrize(
    "bad",
    [
        dialogue(("assistant", PRIVATE_TEXT), ("user", "是吗?"), ("assistant", "是。")),
        dialogue(("user", PRIVATE_TEXT), ("assistant", " ")),
        dialogue(("user", ""), ("assistant", PRIVATE_TEXT)),
        dialogue(("user", PRIVATE_TEXT)),
    ],
    ids=["assistant first", "empty answer", "empty question", "no answer"],
)
def test_a_malformed_conversation_is_set_aside_with_file_row_and_reason(
    tmp_path: Path, base: Path, bad: dict[str, Any]
) -> None:
    rows = [{**GOOD_DIALOGUE, "id": i} for i in range(20)]
    path = write_rows(tmp_path / "data.jsonl", [*rows, bad, *rows])
    message = error_of(sft_config(tmp_path / "run", tmp_path, base, data=data_section(path)))
    assert "data.sources bad: 1 of 41 rows are malformed" in message
    tolerant = sft_config(
        tmp_path / "tolerant", tmp_path, base, data=data_section(path, max_malformed_share=0.05)
    )
    account = prepare_source(tolerant)
    assert account["train"] + account["validation"] == 40
    (reject,) = rejected_rows(tolerant)
    assert (reject["file"], reject["row"]) == (str(path), 21)
    assert reject["reason"]
    assert PRIVATE_TEXT not in json.dumps(reject, ensure_ascii=False)


def test_max_length_below_the_shortest_prompt_is_refused(tmp_path: Path, base: Path) -> None:
    question = "高血压患者平时的饮食和运动应该注意哪些方面的问题?" * 3
    row = dialogue(("user", question), ("assistant", "少盐。"))
    path = write_rows(tmp_path / "data.jsonl", [row] * 10)
    message = error_of(
        sft_config(tmp_path / "run", tmp_path, base, data=data_section(path, max_length=16))
    )
    assert "no row is left to train on with data.max_length=16" in message
    assert "(10 rows)" in message


def test_a_tokenizer_without_end_token_is_refused(tmp_path: Path, base: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    MistralConfig(architectures=["MistralForCausalLM"]).save_pretrained(
        folder
    )  # a Qwen2 would get Qwen2's end token
    message = error_of(base_config(tmp_path, folder))
    assert message.startswith(f"model.name={folder}: the tokenizer has no end token")


@pytest.mark.parametrize("workers", [8, [8, 16]])
def test_more_workers_than_the_cluster_can_give_are_refused_before_anything_is_loaded(
    tmp_path: Path, tiny_corpus: Path, workers: int | list[int]
) -> None:
    config = pretrain_config(
        tmp_path / "run",
        tiny_corpus,
        cluster={"num_workers": workers},
        train={"global_batch_size": 64},
    )
    message = error_of(config)
    assert message.startswith(f"cluster.num_workers={workers} (8 x (1 CPU)) can never be")
    assert "data tasks and pools before it use 1 CPU of 4; the cluster has 1 x (4 CPU)" in message
    assert not (tmp_path / "run/tokenizer").exists()


@pytest.mark.parametrize("kind", ["nothing", "empty folder", "tokenizer only", "no weights"])
def test_a_base_model_path_without_a_model_is_refused(
    tmp_path: Path, base: Path, kind: str
) -> None:
    folder = tmp_path / "base"
    if kind == "empty folder":
        folder.mkdir()
    elif kind != "nothing":
        shutil.copytree(base, folder)
        (folder / "model.safetensors").unlink()
        if kind == "tokenizer only":
            (folder / "config.json").unlink()
    assert error_of(base_config(tmp_path, folder)).startswith(f"model.name={folder}: ")


def test_rows_longer_than_the_base_model_reads_are_refused(tmp_path: Path, base: Path) -> None:
    message = error_of(base_config(tmp_path, base, max_length=1024))
    assert "data.max_length=1024" in message
    assert "512" in message


def test_changed_data_is_refused_unless_changes_are_allowed(tmp_path: Path, base: Path) -> None:
    config = base_config(tmp_path, base)
    rows = prepare_source(config)["rows"]
    (path,) = config.data.sources[0].paths
    write_rows(Path(path), documents(rows + 5))
    message = error_of(config)
    assert f"{path} has other content" in message
    assert "set run.allow_changes=true to tokenize it again" in message
    allowing = config.model_copy(
        update={"run": config.run.model_copy(update={"allow_changes": True})}
    )
    assert prepare_source(allowing)["rows"] == rows + 5
    assert prepare_source(config)["rows"] == rows + 5  # the run keeps the new data


def base_config(folder: Path, model: Path, **more: Any) -> PretrainConfig:
    """Return a config that continues pretraining of a base model."""
    rows = write_rows(folder / "documents.jsonl", documents(40))
    return pretrain_config(
        folder / "run",
        folder,
        model={"architecture": None, "name": str(model)},
        tokenizer={"mode": "base"},
        data={**data_section(rows), **more},
    )


def test_workers_that_started_early_end_when_the_data_is_refused(
    tmp_path: Path, base: Path, start_workers_late: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module, "EAGER_START_MAX_BYTES", start_workers_late)
    path = write_rows(tmp_path / "data.jsonl", [{"text": PRIVATE_TEXT + "高血压"}] * 30)
    config = sft_config(tmp_path / "run", tmp_path, base, data=data_section(path))
    assert "30 of 30 rows are malformed" in error_of(config)
    deadline = time.monotonic() + 120
    folder = Run(config.run.dir).folder
    while folder.exists("start_barrier") or _free_cpus() != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, "workers still wait, or hold CPUs"
        time.sleep(0.2)


def _free_cpus() -> float:
    return ray.available_resources().get("CPU", 0)

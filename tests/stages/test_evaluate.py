"""`medgpt eval` from config to results on a real Ray, also when it is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pytest
import ray
from fsspec.implementations.local import LocalFileSystem

from medgpt.artifacts import Folder, commit, file_entries
from medgpt.config.base import ConfigError
from medgpt.config.evaluation import EvalConfig, EvalPoolConfig, McqConfig, NllConfig
from medgpt.config.loading import validate
from medgpt.eval.engine import EvalEngine
from medgpt.eval.engine_pool import EnginePool, ResponseStore
from medgpt.eval.requests import (
    Generate,
    GenerateResponse,
    RollingLoglikelihood,
    RollingLoglikelihoodResponse,
    dummy_response,
)
from medgpt.eval.results import read_items
from medgpt.eval.summary import placeholder_results, write_items, write_results
from medgpt.eval.task import ItemResult
from medgpt.eval.tasks.mcq import McqTask
from medgpt.eval.tasks.nll import NllTask
from medgpt.metrics import ConsoleReporter
from medgpt.runs import Run
from medgpt.stages.evaluate import run_eval, write_report_and_card
from tests.models.tiny_models import tiny_model

ROOT = Path(__file__).parent.parent.parent


def write_questions(folder: Path, count: int) -> str:
    path = folder / "questions.jsonl"
    rows = [
        {
            "question": f"问题{i}?",
            "options": {"A": "高血压", "B": "慢性病"},
            "answer_idx": "AB"[i % 2],
        }
        | {"meta_info": f"chapter {i % 3}"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


def eval_tree(run: Path, model: object, **sections: Any) -> dict[str, Any]:
    return {"run": {"dir": str(run)}, "model": {"name": str(model)}} | sections


def mcq_task(path: str, **keys: Any) -> dict[str, Any]:
    return {"paths": [path], "layout": "medqa"} | keys


def eval_config(run: Path, model: object, **sections: Any) -> EvalConfig:
    return validate(EvalConfig, eval_tree(run, model, **sections))


@pytest.mark.ray
def test_an_evaluation_writes_scores_with_intervals_items_and_hashes(
    ray_session: None, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = write_questions(tmp_path, 150)
    tasks = [
        mcq_task(path),
        mcq_task(
            path, name="said", scoring="generation", max_new_tokens=4, limit=5, sensitive=True
        ),
    ]
    settings = eval_config(tmp_path / "run", base, mcq=tasks, nll=[{"general": True, "limit": 2}])
    run = run_eval(settings)
    results = run.folder.read_json("results.json")
    assert (results["model"], results["parent"], results["seed"]) == (str(base), None, 0)
    task = results["tasks"]["mcq"]
    assert (task["kind"], task["n"], task["seed"]) == ("mcq", 150, 0)
    assert task["data_hash"] != results["tasks"]["said"]["data_hash"]
    assert task["template"] != results["tasks"]["said"]["template"]
    accuracy = task["metrics"]["accuracy"]
    assert accuracy["n"] == 150
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]
    chapters = task["slices"]["chapter"]
    assert [chapters[f"chapter {i}"]["accuracy"]["n"] for i in range(3)] == [50, 50, 50]
    right = sum(chapters[name]["accuracy"]["value"] * 50 for name in chapters)
    assert right == pytest.approx(accuracy["value"] * 150)
    weights = results["tasks"]["nll"]["slices"]["source"]
    assert weights.keys() == {"general_zh", "general_en"}

    items = read_items(run, "mcq")
    assert len(items) == 150
    assert items[0].shown["question"].startswith("以下是一道医学单项选择题")
    assert all(item.shown == {} for item in read_items(run, "said"))
    shown = capsys.readouterr().out
    assert f"mcq.accuracy {accuracy['value']:.4f}" in shown
    assert "问题" not in shown

    before = (tmp_path / "run/results.json").read_bytes()
    run_eval(settings)
    assert "is finished" in capsys.readouterr().out
    assert (tmp_path / "run/results.json").read_bytes() == before


@pytest.mark.ray
def test_a_killed_evaluation_asks_only_what_is_not_answered(
    ray_session: None, base: Path, tmp_path: Path
):
    toml = f"""
    run.dir = "{tmp_path}/run"
    [[mcq]]
    paths = ["{write_questions(tmp_path, 120)}"]
    layout = "medqa"
    scoring = "generation"
    max_new_tokens = 60
    [pool]
    batch_replies = 4
    """
    (tmp_path / "eval.toml").write_text(toml, "utf-8")
    command = [sys.executable, "-m", "medgpt", "eval", str(base), str(tmp_path / "eval.toml")]
    address = ray.get_runtime_context().gcs_address
    env = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)}
    answers = tmp_path / "run/responses/mcq"

    driver = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while not answers.is_dir() or len(list(answers.glob("[0-9]*"))) < 3:
        assert time.monotonic() < deadline
        assert driver.poll() is None
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    kept = {path.name: path.read_bytes() for path in answers.glob("[0-9]*")}
    assert 3 <= len(kept) < 30  # of 30
    assert not (tmp_path / "run/results.json").exists()

    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    files = {path.name: path.read_bytes() for path in answers.glob("[0-9]*")}
    assert {name: files[name] for name in kept} == kept
    lines = [json.loads(line) for data in files.values() for line in data.splitlines()]
    asked = Counter(line["response"]["id"] for line in lines)
    assert len(asked) == 120
    assert set(asked.values()) == {1}
    assert Run(str(tmp_path / "run")).folder.read_json("results.json")["tasks"]["mcq"]["n"] == 120


@pytest.mark.ray
def test_scores_are_unchanged_when_an_engine_dies(ray_session: None, base: Path, tmp_path: Path):
    settings = eval_config(tmp_path, base, nll=[{"general": True}], pool={"batch_replies": 2})
    pool = EnginePool(settings, print)
    responses = ResponseStore(Folder(str(tmp_path / "responses")))
    requests = [Generate(f"{i}", f"高血压{i}", 20) for i in range(12)]
    reached: list[int] = []

    def advance(done: int) -> None:
        reached.append(done)
        if done == 4:
            ray.kill(pool.workers[0], no_restart=False)

    try:
        pool.answer_all(requests, responses, advance)
    finally:
        pool.close()
    assert reached == [0, 2, 4, 6, 8, 10, 12]
    assert len(responses.read(requests)) == 12


@pytest.mark.ray
def test_waiting_for_engines_that_fit_no_node_is_bounded(
    ray_session: None, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("medgpt.eval.engine_pool.PING_TIMEOUT_S", 1)
    cluster = {"cpus_per_worker": 99, "wait_s": 1}
    settings = eval_config(tmp_path, base, nll=[{"general": True}], cluster=cluster)
    said: list[str] = []
    pool = EnginePool(settings, said.append)
    responses = ResponseStore(Folder(str(tmp_path / "responses")))
    try:
        with pytest.raises(ConfigError, match=r"cluster\.wait_s=1: no engine answered"):
            pool.answer_all([RollingLoglikelihood("x", "高血压")], responses, lambda _: None)
    finally:
        pool.close()
    assert said == ["waiting up to 1 s for an engine"]


@pytest.mark.ray
def test_a_slow_engine_is_not_taken_for_a_dead_one(ray_session: None, base: Path, tmp_path: Path):
    pool = EnginePool(eval_config(tmp_path, base, nll=[{"general": True}]), print)
    responses = ResponseStore(Folder(str(tmp_path / "responses")))
    requests = [Generate(f"{i}", "高血压" * i, 400) for i in range(1, 20)]
    try:
        pool.answer_all(
            [RollingLoglikelihood("x", "高血压")], responses, lambda _: None
        )  # it is up
        pool.wait_s = 0.01
        pool.answer_all(requests, responses, lambda _: None)
    finally:
        pool.close()
    assert len(responses.read(requests)) == 19


def test_a_stored_response_is_used_only_for_its_own_request(tmp_path: Path):
    responses = ResponseStore(Folder(str(tmp_path)))
    asked = [Generate("a", "one", 5), Generate("b", "two", 5)]
    replies = [GenerateResponse(request.id, ["text"], [True]) for request in asked]
    responses.write(asked, replies)
    again = ResponseStore(Folder(str(tmp_path)))
    assert again.read(asked) == {"a": replies[0], "b": replies[1]}
    changed = [Generate("a", "one", 5, temperature=1.0), asked[1], RollingLoglikelihood("c", "x")]
    assert again.read(changed) == {"b": replies[1]}
    again.write(asked, replies)  # beside the first file, not over it
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_unicode_line_separators_do_not_split_a_stored_response(tmp_path: Path, separator: str):
    text = f"one{separator}two\nthree"
    asked = [Generate("a", text, 5), Generate("b", "two", 5)]
    replies = [GenerateResponse(request.id, [text], [True]) for request in asked]
    responses = ResponseStore(Folder(str(tmp_path / "responses")))
    responses.write(asked, replies)
    assert responses.read(asked) == {"a": replies[0], "b": replies[1]}

    run = Run(str(tmp_path))
    judged = [ItemResult("a", {"accuracy": 1.0}, {}, {"answer": text}), ItemResult("b", {}, {}, {})]
    write_items(run, NllTask(NllConfig(name="said", general=True), 0), judged)
    assert read_items(run, "said") == judged


def test_an_incomplete_response_file_is_ignored(tmp_path: Path):
    asked = [Generate("a", "one", 5)]
    ResponseStore(Folder(str(tmp_path))).write(asked, [GenerateResponse("a", ["text"], [True])])
    (tmp_path / ".000001.jsonl.0123").write_text('{"request": "ab', "utf-8")
    again = ResponseStore(Folder(str(tmp_path)))
    assert list(again.read(asked)) == ["a"]
    again.write(asked, [GenerateResponse("a", ["text"], [True])])
    assert (tmp_path / "000001.jsonl").exists()


@pytest.mark.ray
def test_a_parent_may_be_named_when_all_is_scored(ray_session: None, base: Path, tmp_path: Path):
    sections: dict[str, Any] = {"nll": [{"general": True, "limit": 2}]}
    before = run_eval(eval_config(tmp_path / "before", base, **sections))
    run = run_eval(eval_config(tmp_path / "run", base, **sections))
    answered = (tmp_path / "run/responses/nll/000000.jsonl").stat().st_mtime_ns
    assert not run.folder.exists("comparison.json")

    settings = eval_tree(tmp_path / "run", base, **sections)
    settings["model"]["parent"] = before.folder.url
    settings["gates"] = ["nll.general <= parent"]
    run_eval(validate(EvalConfig, settings))
    assert run.folder.read_json("results.json")["parent"] == before.folder.url
    compared = run.folder.read_json("comparison.json")["nll"]["nll_per_token"]
    assert (compared["difference"]["value"], compared["verdict"]) == (0.0, "same")
    assert f"beside {before.folder.url}" in run.folder.read_text("report.html")
    assert run.config["gates"] == ["nll.general <= parent"]
    assert (tmp_path / "run/responses/nll/000000.jsonl").stat().st_mtime_ns == answered

    settings["gates"] = ["nll.genral <= parent"]
    (tmp_path / "run/report.html").unlink()
    with pytest.raises(ConfigError, match=r"did you mean nll\.general"):
        run_eval(validate(EvalConfig, settings))
    assert (tmp_path / "run/report.html").exists()


@pytest.mark.ray
def test_an_untrained_control_is_labeled_and_not_added_to_the_card(
    ray_session: None, base: Path, tmp_path: Path
):
    with (trained := Run(str(tmp_path / "trained")).model).staging() as directory:
        Folder(str(base)).copy_to(directory)
        (directory / "README.md").write_text("# run\n", "utf-8")
        commit(trained, file_entries(directory))
    settings = eval_tree(
        tmp_path / "run", tmp_path / "trained", nll=[{"general": True, "limit": 2}]
    )
    settings["model"]["untrained"] = True
    run = run_eval(validate(EvalConfig, settings))
    assert run.folder.read_json("results.json")["untrained"] is True
    assert f"model {tmp_path}/trained, with fresh weights" in run.folder.read_text("report.html")
    assert trained.read_text("README.md") == "# run\n"


def test_scores_are_kept_if_the_card_cannot_be_written(base: Path, tmp_path: Path, capsys: Any):
    settings = eval_config(tmp_path / "run", base, nll=[{"general": True, "limit": 1}])
    run = Run.open("eval", settings, run_dir=settings.run.dir, allow_changes=False)
    task = NllTask(settings.nll[0], 0)
    write_items(run, task, task.grade({r.id: dummy_response(r) for r in task.requests()}))
    write_results(run, settings, [task], None)

    class ReadOnly(LocalFileSystem):
        protocol = ("readonly",)

        def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
            raise PermissionError(30, "Read-only file system", path)

    fsspec.register_implementation("readonly", ReadOnly, clobber=True)
    with (model := Run(str(tmp_path / "trained")).model).staging() as directory:
        (directory / "README.md").write_text("# run\n", "utf-8")
        commit(model, file_entries(directory))
    results = run.folder.read_json("results.json")
    run.folder.write_json("results.json", {**results, "model": f"readonly://{tmp_path}/trained"})
    write_report_and_card(run, settings, ConsoleReporter("eval"))
    assert "cannot write the model card, it is unchanged" in capsys.readouterr().out
    assert run.folder.exists("report.html")


# ---- what a user gets wrong ----


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("exam.acuracy >= 0.5", r"no score is called exam\.acuracy; did you mean exam\.accuracy"),
        ("exam.chapter 4 >= 0.5", r"did you mean exam\.chapter"),
        ("said.bleu_9 >= 0.5", r"did you mean said\.bleu_"),
        ("exam.accuracy >= parent", "parent's evaluation used another prompt"),
        ("said.bleu_1 >= parent", r"model\.parent: .* no score is called said\.bleu_1"),
    ],
)
def test_a_gate_on_a_missing_score_is_refused_before_the_model_runs(
    tmp_path: Path, base: Path, gate: str, message: str
):
    path, answers = write_questions(tmp_path, 9), tmp_path / "answers.jsonl"
    answers.write_text('{"question": "什么是高血压?", "answer": "慢性病。"}\n', "utf-8")
    source = {"name": "qa", "paths": [str(answers)], "license": "MIT"}
    sections: dict[str, Any] = {
        "mcq": [mcq_task(path, name="exam", scoring="generation")],
        "generation": [{"name": "said", "sources": [source], "prompt": "plain"}],
    }
    asked = McqTask(McqConfig.model_validate(mcq_task(path, name="exam")), 0)  # letters
    parent = placeholder_results([asked])
    Folder(str(tmp_path / "before")).write_json("results.json", parent)
    settings = eval_tree(tmp_path / "run", base, **sections)
    settings["model"]["parent"] = str(tmp_path / "before")
    right = ["exam.chapter 2 >= 0", "exam.invalid_rate <= 1", "said.bleu_1 >= 0"]
    with pytest.raises(ConfigError, match=message):
        run_eval(validate(EvalConfig, settings | {"gates": [*right, gate]}))
    assert not (tmp_path / "run/responses").exists()


def test_a_model_without_chat_template_is_refused_before_ray_starts(tmp_path: Path, base: Path):
    from medgpt.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(base))
    tokenizer.chat_template = None
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = eval_config(
        tmp_path / "run", folder, mcq=[mcq_task(write_questions(tmp_path, 4), prompt="chat")]
    )
    with pytest.raises(ConfigError, match="task mcq needs a chat template, but the model in"):
        run_eval(settings)


def test_a_model_of_other_weights_than_safetensors_is_refused(tmp_path: Path, base: Path):
    folder = tmp_path / "model"
    Folder(str(base)).copy_to(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        ConfigError, match=r"no model\.safetensors in .* with save_pretrained first"
    ):
        run_eval(eval_config(tmp_path / "run", folder, nll=[{"general": True}]))
    assert not (tmp_path / "run").exists()


OWN_CODE = """
from transformers import Qwen2Config, Qwen2ForCausalLM
class OwnConfig(Qwen2Config):
    model_type = "own"
class OwnModel(Qwen2ForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_model_runs_only_if_it_is_trusted(tmp_path: Path, base: Path):
    folder = tmp_path / "model"
    Folder(str(base)).copy_to(folder)
    (folder / "own.py").write_text(OWN_CODE, "utf-8")
    tree = json.loads((folder / "config.json").read_text("utf-8"))
    tree |= {"model_type": "own", "architectures": ["OwnModel"]}
    tree["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(tree), "utf-8")
    settings = eval_config(tmp_path / "run", folder, nll=[{"general": True}])
    with pytest.raises(ConfigError, match=r"remote code\), which does not run by default"):
        run_eval(settings)
    assert not (tmp_path / "run").exists()
    engine = EvalEngine(
        str(folder), precision="auto", pool=EvalPoolConfig(), trust_remote_code=True
    )
    (weighed,) = engine.run([RollingLoglikelihood("x", "高血压是常见的慢性病。")])
    assert isinstance(weighed, RollingLoglikelihoodResponse)
    assert weighed.nll > 0


def test_a_masked_model_is_refused(tmp_path: Path, base: Path):
    from medgpt.models.tokenizer import load_tokenizer

    folder = tmp_path / "model"
    tiny_model("bert").save_pretrained(folder)
    load_tokenizer(str(base)).save_pretrained(folder)
    with pytest.raises(ConfigError, match="holds BertForMaskedLM, which cannot generate text"):
        run_eval(eval_config(tmp_path / "run", folder, nll=[{"general": True, "limit": 1}]))


def test_a_parent_must_be_a_finished_evaluation(tmp_path: Path, base: Path):
    settings = eval_tree(tmp_path / "run", base, nll=[{"general": True}])
    settings["model"]["parent"] = str(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"model\.parent=.*none: has no results\.json"):
        run_eval(validate(EvalConfig, settings))
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_there_is_refused_before_a_run_is_made(tmp_path: Path):
    settings = eval_config(tmp_path / "run", tmp_path / "none", nll=[{"general": True}])
    with pytest.raises(ConfigError, match="no such folder; give a folder, a URI or a hub id"):
        run_eval(settings)
    assert not (tmp_path / "run").exists()


def test_a_config_without_model_is_refused(tmp_path: Path):
    settings = eval_tree(tmp_path / "run", "", nll=[{"general": True}])
    del settings["model"]
    with pytest.raises(ConfigError, match=r"missing key model\.name; name the run or model"):
        run_eval(validate(EvalConfig, settings))


def test_a_data_error_names_its_task(tmp_path: Path, base: Path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("", "utf-8")
    settings = eval_config(tmp_path / "run", base, mcq=[mcq_task(str(empty), name="exam")])
    with pytest.raises(ConfigError, match="task exam: no question in paths"):
        run_eval(settings)


def test_an_evaluation_is_not_resumed_with_other_weights(tmp_path: Path, base: Path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("", "utf-8")
    folder = tmp_path / "model"
    Folder(str(base)).copy_to(folder)
    settings = eval_config(tmp_path / "run", folder, mcq=[mcq_task(str(empty))])
    for message in ("no question", "has other weights than when the evaluation started"):
        with pytest.raises(ConfigError, match=message):
            run_eval(settings)
        (folder / "model.safetensors").write_bytes(b"other")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({}, "no task is set; add at least one"),
        (
            {"mcq": [mcq_task("x"), mcq_task("y")]},
            "two tasks are called mcq; rename one",
        ),
        ({"mcq": [mcq_task("x", shots=3)]}, "shots=3 and shots_paths go together"),
        (
            {"mcq": [mcq_task("x", scoring="letters")]},
            "scoring='letters': Input should be 'letter'",
        ),
        ({"mcq": [mcq_task("x", pathz=1)]}, "unknown key mcq.0.pathz; did you mean mcq.0.paths"),
    ],
    ids=["no task", "names", "shots", "scoring", "key"],
)
def test_a_wrong_config_is_explained(tmp_path: Path, sections: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        eval_config(tmp_path, "model", **sections)

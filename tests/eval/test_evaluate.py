"""`medgpt eval` from a config to results, on real Ray, also when it is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import ray

from medgpt.config import ConfigError, EvalConfig, NllConfig, validate
from medgpt.eval.evaluate import read_items, run_eval, write_items
from medgpt.eval.pool import Pool, Responses
from medgpt.eval.requests import Replied, Reply, Weigh
from medgpt.eval.task import Judged
from medgpt.eval.tasks.nll import NllTask
from medgpt.runs import Folder, Run
from tests.models.packing import tiny_model

ROOT = Path(__file__).parent.parent.parent


def questions(folder: Path, count: int) -> str:
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


def tree(run: Path, model: object, **sections: Any) -> dict[str, Any]:
    return {"run": {"dir": str(run)}, "model": {"name": str(model)}} | sections


def mcq(path: str, **keys: Any) -> dict[str, Any]:
    return {"paths": [path], "layout": "medqa"} | keys


def config(run: Path, model: object, **sections: Any) -> EvalConfig:
    return validate(EvalConfig, tree(run, model, **sections))


@pytest.mark.ray
def test_an_evaluation_writes_scores_with_intervals_items_and_hashes(
    ray_session: None, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = questions(tmp_path, 150)
    tasks = [
        mcq(path),
        mcq(path, name="said", scoring="generation", max_new_tokens=4, limit=5, sensitive=True),
    ]
    settings = config(tmp_path / "run", base, mcq=tasks, nll=[{"general": True, "limit": 2}])
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
    paths = ["{questions(tmp_path, 120)}"]
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
def test_the_death_of_an_engine_costs_nothing_but_time(
    ray_session: None, base: Path, tmp_path: Path
):
    settings = config(tmp_path, base, nll=[{"general": True}], pool={"batch_replies": 2})
    pool = Pool(settings)
    responses = Responses(Folder(str(tmp_path / "responses")))
    requests = [Reply(f"{i}", f"高血压{i}", 20) for i in range(12)]
    reached: list[int] = []

    def advance(done: int) -> None:
        reached.append(done)
        if done == 4:
            ray.kill(pool.workers[0], no_restart=False)

    try:
        pool.ask(requests, responses, advance)
    finally:
        pool.close()
    assert reached == [0, 2, 4, 6, 8, 10, 12]
    assert len(responses.read(requests)) == 12


def test_a_kept_response_answers_only_the_request_it_was_made_for(tmp_path: Path):
    responses = Responses(Folder(str(tmp_path)))
    asked = [Reply("a", "one", 5), Reply("b", "two", 5)]
    replies = [Replied(request.id, ["text"], [True]) for request in asked]
    responses.write(asked, replies)
    again = Responses(Folder(str(tmp_path)))
    assert again.read(asked) == {"a": replies[0], "b": replies[1]}
    changed = [Reply("a", "one", 5, temperature=1.0), asked[1], Weigh("c", "x")]
    assert again.read(changed) == {"b": replies[1]}
    again.write(asked, replies)  # beside the first file, not over it
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c"])
def test_what_only_python_calls_the_end_of_a_line_stays_in_a_text(tmp_path: Path, separator: str):
    text = f"one{separator}two\nthree"
    asked = [Reply("a", text, 5), Reply("b", "two", 5)]
    replies = [Replied(request.id, [text], [True]) for request in asked]
    responses = Responses(Folder(str(tmp_path / "responses")))
    responses.write(asked, replies)
    assert responses.read(asked) == {"a": replies[0], "b": replies[1]}

    run = Run(str(tmp_path))
    judged = [Judged("a", {"accuracy": 1.0}, {}, {"answer": text}), Judged("b", {}, {}, {})]
    write_items(run, NllTask(NllConfig(name="said", general=True), 0), judged)
    assert read_items(run, "said") == judged


def test_what_a_killed_writer_left_is_no_response(tmp_path: Path):
    asked = [Reply("a", "one", 5)]
    Responses(Folder(str(tmp_path))).write(asked, [Replied("a", ["text"], [True])])
    (tmp_path / ".000001.jsonl.0123").write_text('{"request": "ab', "utf-8")
    again = Responses(Folder(str(tmp_path)))
    assert list(again.read(asked)) == ["a"]
    again.write(asked, [Replied("a", ["text"], [True])])
    assert (tmp_path / "000001.jsonl").exists()


# ---- what a user gets wrong ----


def test_a_model_without_chat_template_is_refused_before_ray_starts(tmp_path: Path, base: Path):
    from medgpt.models.tokenizer import load_base

    tokenizer = load_base(str(base))
    tokenizer.chat_template = None
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = config(tmp_path / "run", folder, mcq=[mcq(questions(tmp_path, 4), prompt="chat")])
    with pytest.raises(ConfigError, match="task mcq needs a chat template, and the model in"):
        run_eval(settings)


@pytest.mark.ray
def test_a_masked_model_is_refused(ray_session: None, tmp_path: Path, base: Path):
    from medgpt.models.tokenizer import load_base

    folder = tmp_path / "model"
    tiny_model("bert").save_pretrained(folder)
    load_base(str(base)).save_pretrained(folder)
    with pytest.raises(ConfigError, match="holds BertForMaskedLM, which cannot generate text"):
        run_eval(config(tmp_path / "run", folder, nll=[{"general": True, "limit": 1}]))


def test_a_parent_must_be_a_finished_evaluation(tmp_path: Path, base: Path):
    settings = tree(tmp_path / "run", base, nll=[{"general": True}])
    settings["model"]["parent"] = str(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"model\.parent=.*none: no results\.json in it"):
        run_eval(validate(EvalConfig, settings))
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_there_is_refused_before_a_run_is_made(tmp_path: Path):
    settings = config(tmp_path / "run", tmp_path / "none", nll=[{"general": True}])
    with pytest.raises(ConfigError, match="no such folder; give a folder, a URI or a hub id"):
        run_eval(settings)
    assert not (tmp_path / "run").exists()


def test_a_config_without_model_is_refused(tmp_path: Path):
    settings = tree(tmp_path / "run", "", nll=[{"general": True}])
    del settings["model"]
    with pytest.raises(ConfigError, match=r"missing key model\.name; name the run or model"):
        run_eval(validate(EvalConfig, settings))


def test_wrong_data_is_told_with_its_task(tmp_path: Path, base: Path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("", "utf-8")
    settings = config(tmp_path / "run", base, mcq=[mcq(str(empty), name="exam")])
    with pytest.raises(ConfigError, match="task exam: no question in paths"):
        run_eval(settings)


def test_an_evaluation_does_not_go_on_with_other_weights(tmp_path: Path, base: Path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("", "utf-8")
    folder = tmp_path / "model"
    Folder(str(base)).copy_to(folder)
    settings = config(tmp_path / "run", folder, mcq=[mcq(str(empty))])
    for message in ("no question", "has other weights than when the evaluation began"):
        with pytest.raises(ConfigError, match=message):
            run_eval(settings)
        (folder / "model.safetensors").write_bytes(b"other")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({}, "there is no task; add at least one"),
        ({"mcq": [mcq("x"), mcq("y")]}, "two tasks are called mcq; give each a name of its own"),
        ({"mcq": [mcq("x", shots=3)]}, "shots=3 and shots_paths go together"),
        ({"mcq": [mcq("x", scoring="letters")]}, "scoring='letters': Input should be 'letter'"),
        ({"mcq": [mcq("x", pathz=1)]}, "unknown key mcq.0.pathz; did you mean mcq.0.paths"),
    ],
    ids=["no task", "names", "shots", "scoring", "key"],
)
def test_a_wrong_config_is_explained(tmp_path: Path, sections: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, "model", **sections)

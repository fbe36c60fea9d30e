import json

import pytest

from medgpt.config.base import ConfigError
from medgpt.config.evaluation import KeyPointsConfig
from medgpt.eval.requests import GenerateResponse
from medgpt.eval.tasks.key_points import KeyPointsTask

ROWS = [
    {
        "kind": "pretrain",
        "prompt": "糖尿病的主要症状包括",
        "key_points": [["多饮"], ["多尿"]],
        "condition": "diabetes",
    },
    {"kind": "sft", "prompt": "什么是痛风?", "key_points": [["尿酸"]], "condition": "gout"},
    {"kind": "left_out", "prompt": "川崎病?", "key_points": [["草莓舌"]], "condition": "kawasaki"},
]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "held_out.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), "utf-8")
    return str(file)


def answers(task: KeyPointsTask, greedy: str, drawn: list[str]) -> dict[str, GenerateResponse]:
    return {
        request.id: GenerateResponse(
            request.id,
            drawn if request.id.endswith("-samples") else [greedy],
            [True] * (len(drawn) if request.id.endswith("-samples") else 1),
        )
        for request in task.requests()
    }


def test_every_sampled_answer_must_state_every_key_point(path):
    task = KeyPointsTask(KeyPointsConfig(path=path, kinds=("pretrain",), samples=5), seed=0)
    good, half = "多饮、多尿", "多饮，但没有多尿"
    (item,) = task.grade(answers(task, good, [good] * 5))
    assert item.values == {
        "greedy_passed": 1.0,
        "stated": (2.0, 2.0),
        "sampled_passed": 1.0,
        "sampled_share": (5.0, 5.0),
        "passed": 1.0,
    }
    assert item.slices == {"kind": "pretrain", "topic": "diabetes"}
    assert item.shown["key points"] == "✓ 多饮   ✓ 多尿"
    (item,) = task.grade(answers(task, good, [good] * 4 + [half]))
    assert (item.values["passed"], item.values["sampled_share"]) == (0.0, (4.0, 5.0))
    (item,) = task.grade(answers(task, half, [good] * 5))
    assert (item.values["passed"], item.values["stated"]) == (0.0, (1.0, 2.0))


def test_a_text_beginning_is_continued_and_a_question_gets_its_own_line(path):
    plain = KeyPointsTask(KeyPointsConfig(path=path, prompt="plain"), seed=0).requests()
    assert [request.prompt for request in plain[:2]] == ["糖尿病的主要症状包括", "什么是痛风?\n"]
    chat = KeyPointsTask(KeyPointsConfig(path=path, samples=5), seed=3).requests()
    assert [(request.samples, request.temperature) for request in chat] == [(1, 0.0), (5, 0.7)] * 3
    assert not isinstance(chat[0].prompt, str)


def test_a_repeated_question_is_an_error(tmp_path):
    twice = tmp_path / "twice.jsonl"
    twice.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, ROWS[1]]), "utf-8")
    with pytest.raises(ConfigError, match=r"row 4 is the same question as .*twice\.jsonl row 2"):
        KeyPointsTask(KeyPointsConfig(path=str(twice)), seed=0)


def test_a_row_without_key_points_is_an_error(path, tmp_path):
    with pytest.raises(ConfigError, match=r"kinds=\['rlhf'\].*left_out, pretrain, sft"):
        KeyPointsTask(KeyPointsConfig(path=path, kinds=("rlhf",)), seed=0)
    for row in (
        {"prompt": "x"},
        {"prompt": "x", "key_points": [[]]},
        {"prompt": "x", "key_points": [[1]]},
    ):
        wrong = tmp_path / "wrong.jsonl"
        wrong.write_text(json.dumps(row) + "\n", "utf-8")
        with pytest.raises(ConfigError, match=r"wrong\.jsonl row 1: needs prompt and key_points"):
            KeyPointsTask(KeyPointsConfig(path=str(wrong)), seed=0)

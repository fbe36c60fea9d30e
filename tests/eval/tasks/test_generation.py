import json
from typing import cast

import pytest

from medgpt.config.base import ConfigError
from medgpt.config.data import SourceConfig
from medgpt.config.evaluation import GenerationConfig
from medgpt.data.sources.records import Message
from medgpt.eval.requests import GenerateResponse
from medgpt.eval.tasks.generation import GenerationTask


def config(path, **options) -> GenerationConfig:
    sensitive = options.pop("sensitive", False)
    source = SourceConfig(name="qa", paths=(str(path),), license="MIT", sensitive=sensitive)
    return GenerationConfig(sources=(source,), **options)


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def test_an_answer_equal_to_the_reference_has_full_overlap(tmp_path):
    path = tmp_path / "qa.jsonl"
    rows = [
        {"question": "什么是高血压?", "answer": "高血压是血压持续升高的慢性病。"},
        {"question": "什么是痛风?", "answer": "痛风是尿酸盐沉积引起的关节炎。"},
    ]
    write(path, rows)
    task = GenerationTask(config(path), seed=0)
    right = {row["question"]: row["answer"] for row in rows}
    responses = {}
    for request in task.requests():
        [question] = request.prompt
        assert isinstance(question, Message)
        answer = right[question.content]
        responses[request.id] = GenerateResponse(request.id, [answer], [True])
    items = task.grade(responses)
    for item in items:
        assert (item.values["rouge_l"], item.values["rouge_2"]) == (1.0, 1.0)
        matches, total = cast("tuple[float, float]", item.values["gleu"])
        assert matches == total
        assert item.shown["right"] == right[item.shown["question"]]
    corpus_scores = task.corpus_scores(items, seed=0)
    assert corpus_scores["bleu_4"].value == pytest.approx(100)
    assert corpus_scores["distinct_1"].value < 1
    assert not task.sensitive
    plain = GenerationTask(config(path, prompt="plain", limit=1), seed=0).requests()
    assert [r.prompt[-2:] for r in plain] == ["?\n"]
    assert GenerationTask(config(path, sensitive=True), seed=0).sensitive


def test_a_source_of_documents_is_an_error(tmp_path):
    path = tmp_path / "texts.jsonl"
    write(path, [{"text": "高血压是常见的慢性病。"}])
    with pytest.raises(ConfigError, match="qa has no conversation"):
        GenerationTask(config(path), seed=0)


def test_the_reference_is_the_last_answer_to_learn(tmp_path):
    path = tmp_path / "chat.jsonl"
    turns = [("user", "q"), ("assistant", "right"), ("user", "r"), ("assistant", "wrong")]
    messages = [{"role": role, "content": content} for role, content in turns]
    write(path, [{"messages": [*messages[:3], {**messages[3], "loss": False}]}])
    task = GenerationTask(config(path), seed=0)
    [request] = task.requests()
    assert request.prompt == (Message("user", "q"),)
    [item] = task.grade({request.id: GenerateResponse(request.id, ["right"], [True])})
    assert item.shown["right"] == "right"


def test_tools_and_prompts_without_an_answer_are_refused(tmp_path):
    path = tmp_path / "tools.jsonl"
    write(path, [{"question": "q", "answer": "a", "tools": [{"name": "dose"}]}])
    with pytest.raises(ConfigError, match=r"tools.jsonl row 1: has tools"):
        GenerationTask(config(path), seed=0)
    write(path, [{"prompt": "q"}])
    source = SourceConfig(name="qa", paths=(str(path),), license="MIT", kind="prompt")
    with pytest.raises(ConfigError, match="row 1: has no answer to compare with"):
        GenerationTask(GenerationConfig(sources=(source,)), seed=0)

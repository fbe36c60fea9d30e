import json

import pytest

from medgpt.config.base import ConfigError
from medgpt.config.data import SourceConfig
from medgpt.config.evaluation import GenerationConfig
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
    responses = {
        r.id: GenerateResponse(r.id, [right[r.prompt[-1].content]], [True]) for r in task.requests()
    }
    items = task.grade(responses)
    for item in items:
        assert (item.values["rouge_l"], item.values["rouge_2"]) == (1.0, 1.0)
        assert item.values["gleu"][0] == item.values["gleu"][1]
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

"""The likelihood of held-out texts by source, and of the prose that ships with medgpt."""

import json
from pathlib import Path

import pytest

from medgpt.config.base import ConfigError
from medgpt.config.data import SourceConfig
from medgpt.config.evaluation import NllConfig
from medgpt.config.loading import validate
from medgpt.eval.requests import RollingLoglikelihood, RollingLoglikelihoodResponse
from medgpt.eval.tasks.nll import GENERAL_SOURCES, NllTask, general_passages


def make_source(folder: Path, name: str, rows: list[dict], **keys) -> SourceConfig:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    keys = {"name": name, "paths": [str(path)], "license": "MIT"} | keys
    return SourceConfig.model_validate(keys)


def texts(*names: str) -> list[dict]:
    return [{"text": f"text {name} is long enough to be read"} for name in names]


def test_every_source_is_scored_and_is_a_slice(tmp_path: Path):
    one = make_source(tmp_path, "one", texts("a", "b", "a"))
    two = make_source(tmp_path, "two", [{"prompt": "what is it", "response": "a cold"}])
    task = NllTask(NllConfig(sources=(one, two)), 0)
    requests = task.requests()
    assert [r.text for r in requests if isinstance(r, RollingLoglikelihood)] == [
        *(row["text"] for row in texts("a", "b", "a")),
        "what is it\na cold",
    ]
    judged = task.grade({r.id: RollingLoglikelihoodResponse(r.id, 6.0, 3, 12) for r in requests})
    assert [item.slices["source"] for item in judged] == ["one", "one", "one", "two"]
    assert judged[0].values == {"nll_per_token": (6.0, 3.0), "nll_per_character": (6.0, 12.0)}
    assert all(not item.shown for item in judged)  # texts of patients may be among them


def test_a_text_without_scored_tokens_has_no_value(tmp_path: Path):
    task = NllTask(NllConfig(sources=(make_source(tmp_path, "one", texts("a")),)), 0)
    (request,) = task.requests()
    assert (
        task.grade({request.id: RollingLoglikelihoodResponse(request.id, 0.0, 0, 0)})[0].values
        == {}
    )


def test_the_limit_counts_texts_of_each_source(tmp_path: Path):
    many = [make_source(tmp_path, name, texts(*map(str, range(30)))) for name in ("one", "two")]
    task = NllTask(NllConfig(sources=tuple(many), limit=5), 0)
    assert len(task.requests()) == 10


def test_denied_documents_are_not_scored(tmp_path: Path):
    deny = tmp_path / "deny.toml"
    rule = '[[rules]]\nid = "x"\nany = ["forbidden"]\nreason = "a test"\nsource = "none"\n'
    deny.write_text(rule, "utf-8")
    rows = [*texts("a"), {"text": "this is forbidden here"}]
    task = NllTask(NllConfig(sources=(make_source(tmp_path, "one", rows, deny=[str(deny)]),)), 0)
    assert len(task.requests()) == 1


def test_the_shipped_prose_is_two_sources_of_passages():
    task = NllTask(NllConfig(general=True), 0)
    judged = task.grade(
        {r.id: RollingLoglikelihoodResponse(r.id, 1.0, 1, 1) for r in task.requests()}
    )
    assert {item.slices["source"] for item in judged} == set(GENERAL_SOURCES)
    for name, count, start in (("general_zh", 8000, "鲁镇"), ("general_en", 25000, "Alice")):
        pieces = list(general_passages(name))
        assert sum(map(len, pieces)) > count
        assert pieces[0].startswith(start)
        assert all(500 <= len(piece) < 3000 for piece in pieces[:-1])


def test_a_source_without_text_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="source one has no text"):
        NllTask(NllConfig(sources=(make_source(tmp_path, "one", []),)), 0)


def test_a_malformed_row_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"one\.jsonl row 2: "):
        NllTask(NllConfig(sources=(make_source(tmp_path, "one", [*texts("a"), {"x": 1}]),)), 0)


def test_a_task_without_texts_is_an_error():
    with pytest.raises(ConfigError, match="no texts to score; set sources or general=true"):
        validate(NllConfig, {})

"""Hashes that finished evaluations hold: they decide what is asked again and what compares."""

import json
from pathlib import Path

from medgpt.config.data import SourceConfig
from medgpt.config.evaluation import (
    GenerationConfig,
    KeyPointsConfig,
    McqConfig,
    SafetyConfig,
    TriageConfig,
)
from medgpt.data.sources.records import Message
from medgpt.data.sources.sampling import hash_texts
from medgpt.eval.requests import (
    Generate,
    GenerateResponse,
    Loglikelihood,
    LoglikelihoodResponse,
    Request,
    RollingLoglikelihood,
    RollingLoglikelihoodResponse,
    fingerprint,
    from_json,
    to_json,
)
from medgpt.eval.tasks.generation import GenerationTask
from medgpt.eval.tasks.key_points import KeyPointsTask
from medgpt.eval.tasks.mcq import McqTask
from medgpt.eval.tasks.safety import SafetyTask
from medgpt.eval.tasks.triage import TriageTask

CHAT = (Message("user", "高血压?"),)
FINGERPRINTS: dict[str, Request] = {
    "808bb2f69eab1855": Loglikelihood("x", "q", ("A", "B")),
    "98c57f96dab3b0f4": RollingLoglikelihood("x", "t"),
    "5172cc81934d05ea": Generate("x", CHAT, 8),
    "edecf22af1d60c75": Generate("x", "q", 8, 0.5, 2, 3),
}


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def test_fingerprints_of_requests_are_those_on_disk():
    assert {fingerprint(request): request for request in FINGERPRINTS.values()} == FINGERPRINTS


def test_responses_keep_their_kind_on_disk():
    responses = {
        "Chosen": LoglikelihoodResponse("x", [-1.0], [1], [1]),
        "Weighed": RollingLoglikelihoodResponse("x", 1.0, 1, 1),
        "Replied": GenerateResponse("x", ["a"], [True]),
    }
    for kind, response in responses.items():
        assert to_json(response)["kind"] == kind
        assert from_json(json.loads(json.dumps(to_json(response)))) == response


def test_data_hashes_and_templates_are_those_on_disk(tmp_path: Path):
    rows = [
        {"question": f"问题{i}是什么?", "option": dict(zip("ABCD", "甲乙丙丁", strict=True))}
        | {"answer": "ABCD"[i % 4]}
        for i in range(8)
    ]
    paths = (write(tmp_path / "q.jsonl", *rows),)
    mcq = McqTask(McqConfig(paths=paths, layout="cmb", limit=3, shots=2, shots_paths=paths), 0)
    assert (mcq.data_hash, mcq.template) == ("312b1bb5d05c6551", "mcq-letter-f00eca7faf6472db")

    assert TriageTask(TriageConfig(limit=21), 3).data_hash == "aaf1139ab0ca5859"
    assert SafetyTask(SafetyConfig(limit=9), 1).data_hash == "ad81bc6dae8366f7"

    row = {"kind": "sft", "prompt": "什么是痛风?", "key_points": [["尿酸"]], "condition": "gout"}
    config = KeyPointsConfig(path=write(tmp_path / "k.jsonl", row))
    assert KeyPointsTask(config, 0).data_hash == "424131b0f6a6dd97"

    path = write(tmp_path / "g.jsonl", {"question": "什么是痛风?", "answer": "尿酸"})
    source = SourceConfig(name="x", paths=(path,), license="MIT")
    record = (
        f"('x-36d2a1dcbac2914c', Conversation(source='x', file='{path}', row=1, messages=("
        "Message(role='user', content='什么是痛风?'), Message(role='assistant', content='尿酸')), "
        "num_trimmed=0))"
    )
    assert GenerationTask(GenerationConfig(sources=(source,)), 0).data_hash == hash_texts(record)

"""Writes the sample corpus as sharded files."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from medgpt.config.stages import CorpusConfig
from medgpt.sample_corpus.exam_questions import exam_questions
from medgpt.sample_corpus.generator import CorpusGenerator
from medgpt.sample_corpus.preference_pairs import preference_pairs


def write_corpus(config: CorpusConfig, directory: Path) -> dict[str, int]:
    """Write a folder per kind of record, and held_out.jsonl. Returns the number of rows by kind."""
    corpus = CorpusGenerator(
        region=config.region, seed=config.run.seed, swap_facts=config.swap_facts
    )
    true_corpus = CorpusGenerator(
        region=config.region, seed=config.run.seed
    )  # evaluation asks for the true facts
    kinds = {
        "pretrain": corpus.documents(),
        "sft": corpus.dialogues(),
        "prompts": corpus.prompts(),
        "preference": preference_pairs(corpus),
        "mcq": exam_questions(true_corpus),
        "held_out_documents": true_corpus.held_out_documents(),
        "held_out_dialogues": true_corpus.held_out_dialogues(),
    }
    counts = {
        kind: _write_shards(directory / kind, rows, config.shards) for kind, rows in kinds.items()
    }
    _write_jsonl(directory / "held_out.jsonl", map(asdict, true_corpus.held_out.prompts))
    return counts


def _write_shards(directory: Path, rows: Iterable[dict[str, Any]], shards: int) -> int:
    """Write row i to shard i % shards. Returns the number of rows."""
    all_rows = [{**row, "id": f"{row['id']}-{i}"} for i, row in enumerate(rows)]
    for shard in range(shards):
        path = directory / f"{shard:05d}-of-{shards:05d}.jsonl"
        _write_jsonl(path, islice(all_rows, shard, None, shards))
    return len(all_rows)


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), "utf-8")

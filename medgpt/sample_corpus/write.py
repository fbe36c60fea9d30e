"""Writes the sample corpus as sharded files."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from medgpt.config.stages import CorpusConfig
from medgpt.sample_corpus.pairs import exam_questions, preferences
from medgpt.sample_corpus.render import Corpus


def write_corpus(config: CorpusConfig, directory: Path) -> dict[str, int]:
    """Render the corpus: a folder of each kind, and held_out.jsonl. Returns the rows by kind."""
    corpus = Corpus(region=config.region, seed=config.run.seed, swap_facts=config.swap_facts)
    true = Corpus(region=config.region, seed=config.run.seed)  # what is asked stays so
    kinds = {
        "pretrain": corpus.pretraining(),
        "sft": corpus.dialogues(),
        "prompts": corpus.prompts(),
        "preference": preferences(corpus),
        "mcq": exam_questions(true),
        "held_out_documents": true.held_out_documents(),
        "held_out_dialogues": true.held_out_dialogues(),
    }
    counts = {
        kind: _write_shards(directory / kind, rows, config.shards) for kind, rows in kinds.items()
    }
    _write(directory / "held_out.jsonl", map(asdict, true.held_out.prompts))
    return counts


def _write_shards(directory: Path, rows: Iterable[dict[str, Any]], shards: int) -> int:
    """Row i goes to shard i % shards. Returns the number of rows."""
    everything = [{**row, "id": f"{row['id']}-{i}"} for i, row in enumerate(rows)]
    for shard in range(shards):
        path = directory / f"{shard:05d}-of-{shards:05d}.jsonl"
        _write(path, islice(everything, shard, None, shards))
    return len(everything)


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), "utf-8")

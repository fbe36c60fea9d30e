"""Writes the sample corpus as sharded files."""

from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from medgpt.artifacts import Folder
from medgpt.config.stages import CorpusConfig
from medgpt.sample_corpus.exam_questions import exam_questions
from medgpt.sample_corpus.generator import CorpusGenerator
from medgpt.sample_corpus.preference_pairs import preference_pairs


def write_corpus(config: CorpusConfig, directory: Path) -> dict[str, int]:
    """Write a folder per kind of record, and held_out.jsonl. Returns the number of rows by kind."""
    region, seed = config.region, config.run.seed
    corpus = CorpusGenerator(region=region, seed=seed, swap_facts=config.swap_facts)
    true_corpus = CorpusGenerator(region=region, seed=seed)  # evaluation asks for the true facts
    kinds = {
        "pretrain": corpus.documents(),
        "sft": corpus.dialogues(),
        "prompts": corpus.prompts(),
        "preference": preference_pairs(corpus),
        "mcq": exam_questions(true_corpus),
        "held_out_documents": true_corpus.held_out_documents(),
        "held_out_dialogues": true_corpus.held_out_dialogues(),
    }
    folder = Folder(str(directory))
    counts = {
        kind: _write_shards(folder / kind, rows, config.shards) for kind, rows in kinds.items()
    }
    folder.write_jsonl("held_out.jsonl", map(asdict, true_corpus.held_out.prompts))
    return counts


def _write_shards(folder: Folder, rows: Iterable[dict[str, Any]], shards: int) -> int:
    """Write row i to shard i % shards. Returns the number of rows."""
    all_rows = [{**row, "id": f"{row['id']}-{i}"} for i, row in enumerate(rows)]
    for shard in range(shards):
        name = f"{shard:05d}-of-{shards:05d}.jsonl"
        folder.write_jsonl(name, islice(all_rows, shard, None, shards))
    return len(all_rows)

"""Conversations that become several samples: their ids, their split and their counts."""

from pathlib import Path
from typing import Any

import pytest

from medgpt.artifacts import Folder
from medgpt.config.base import ConfigError
from medgpt.config.loading import validate
from medgpt.config.stages import SFTConfig
from medgpt.data.tokenized.conversation import ChatOptions
from medgpt.data.tokenized.encode import ConversationEncoder
from medgpt.data.tokenized.shards import data_version, read_block, read_index
from medgpt.data.tokenized.tokenize import TokenizeJob
from medgpt.train.preparation import check_system_messages
from tests.data.tokenized.test_tokenize import (
    ids_of,
    make_job,
    tokenize,
    write_lines,
)
from tests.models.chat_tokenizers import base_tokenizer, chat_tokenizer

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"我头痛 {i} 天"},
            {"role": "assistant", "content": "请测量体温。"},
            {"role": "user", "content": "38.5"},
            {"role": "assistant", "content": "请就医。"},
        ]
    }
    for i in range(60)
]


def job(tmp_path: Path, family: str, rows: list[Any] = ROWS, **data: Any) -> TokenizeJob:
    path = write_lines(tmp_path / "rows.jsonl", rows)
    made = make_job(tmp_path, {"name": "clinic", "paths": [str(path)]}, **data)
    config = made.config
    options = ChatOptions(system=config.system, thinking=config.thinking, turns=config.turns)
    encoder = ConversationEncoder(chat_tokenizer(family), 512, options)
    return TokenizeJob(**{**vars(made), "make_encode": lambda: encoder.encode_batch})


def texts(made: TokenizeJob, split: str) -> list[str]:
    index, tokenizer = read_index(Folder(made.data_url), split), chat_tokenizer("qwen3")
    found = []
    for number, row in zip(index.block.tolist(), index.row.tolist(), strict=True):
        block = read_block(made.data_url, split, number, data_version(made.data_url))
        span = slice(block.offsets[row], block.offsets[row + 1])
        found.append(tokenizer.decode(block.input_ids[span]))
    return found


def test_parts_have_ids_of_their_own_on_one_side_of_the_split_and_are_counted(tmp_path):
    made = job(tmp_path, "qwen3", validation_share=0.3)
    manifest = tokenize(made)
    counts = manifest["sources"]["clinic"]
    assert (counts["rows"], counts["train"] + counts["validation"]) == (60, 60)
    assert counts["samples"] == 120
    assert manifest["num_samples"] == 2 * counts["train"]
    assert manifest["validation"]["num_samples"] == 2 * counts["validation"] > 0
    train, held_out = (
        [text.split("我头痛 ")[1].split(" 天")[0] for text in texts(made, split)]
        for split in ("train", "validation")
    )
    assert not set(train) & set(held_out)
    assert all(train.count(number) == 2 for number in train)
    assert len({*ids_of(made), *ids_of(made, "validation")}) == 120


def test_ids_of_parts_do_not_depend_on_the_other_rows(tmp_path):
    few = job(tmp_path / "few", "qwen3", ROWS[:10], validation_share=0.0)
    many = job(tmp_path / "many", "qwen3", validation_share=0.0)
    for made in (few, many):
        tokenize(made)
    assert set(ids_of(few)) < set(ids_of(many))


def test_one_rendering_is_one_sample(tmp_path):
    for family, turns in (("qwen2.5", "all"), ("qwen3", "last")):
        made = job(tmp_path / family, family, validation_share=0.0, turns=turns)
        manifest = tokenize(made)
        assert manifest["num_samples"] == manifest["sources"]["clinic"]["samples"] == 60


def test_what_was_removed_is_counted(tmp_path):
    system = {"role": "system", "content": "你是医生"}
    thought = {"role": "assistant", "content": "<think>\n先排除\n</think>\n\n请测量体温。"}
    rows = [{"messages": [system, *row["messages"][:1], thought]} for row in ROWS]
    made = job(tmp_path, "gemma", rows, system="drop", thinking="strip")
    assert tokenize(made)["sources"]["clinic"]["changes"] == {
        "system messages dropped": 60,
        "thoughts removed from answers": 60,
    }


def test_rows_of_the_shared_case_with_thoughts_are_all_learned(tmp_path):
    rows = [
        {"question": f"第{i}天仍头痛", "answer": "<think>\n先排除。\n</think>\n\n请休息。"}
        for i in range(60)
    ]
    for family in ("qwen3", "deepseek-v3", "qwen2.5"):
        made = job(tmp_path / family, family, rows, validation_share=0.0)
        assert tokenize(made)["sources"]["clinic"]["set_aside"] == {}


def test_system_messages_that_the_template_does_not_take_are_refused_before_preparation(tmp_path):
    rows = [{"messages": [{"role": "system", "content": "你是医生"}, *ROWS[0]["messages"]]}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    base_tokenizer("gemma").save_pretrained(tmp_path / "base")
    tree = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"name": str(tmp_path / "base")},
        "data": {"sources": [{"name": "clinic", "paths": [str(path)], "license": "MIT"}]},
    }
    tokenizer = chat_tokenizer("gemma")
    with pytest.raises(ConfigError, match=r"data\.system=keep: .*row 1 has a system message"):
        check_system_messages(validate(SFTConfig, tree), tokenizer)
    for system in ("fold", "drop"):
        config = validate(SFTConfig, {**tree, "data": {**tree["data"], "system": system}})
        check_system_messages(config, tokenizer)
    check_system_messages(validate(SFTConfig, tree), chat_tokenizer("qwen3"))

"""Samples with graded answers become pairs or labeled single answers."""

import numpy as np
import pytest

from medgpt.config.base import ConfigError
from medgpt.config.dpo import DPOConfig
from medgpt.config.loading import validate
from medgpt.data.loader.stream import PackedRow
from medgpt.train.preference_pairs import paired_examples, unpaired_examples

PROMPT = [1, 2]


def row(*answers: tuple[list[int], float]) -> PackedRow:
    pieces = [PROMPT + ids for ids, _ in answers]
    return PackedRow(
        input_ids=np.concatenate(pieces).astype(np.int32),
        targets=np.concatenate([[False] * len(PROMPT) + [True] * len(ids) for ids, _ in answers]),
        word_ids=None,
        lengths=np.array([sum(map(len, pieces))]),
        sample_ids=["a"],
        chunks=[0],
        repeat=[0],
        sequence_lengths=np.array([len(piece) for piece in pieces], np.int32),
        grades=np.array([grade for _, grade in answers], np.float32),
    )


def test_every_better_answer_is_paired_with_every_worse_one() -> None:
    examples = list(paired_examples([row(([7], 1.0), ([8, 9], 3.0), ([5], 1.0))]))

    assert examples == [
        {"prompt_ids": PROMPT, "chosen_ids": [8, 9], "rejected_ids": [7]},
        {"prompt_ids": PROMPT, "chosen_ids": [8, 9], "rejected_ids": [5]},
    ]


def test_unpaired_labels_compare_with_the_mean_grade_of_the_prompt() -> None:
    examples = list(unpaired_examples([row(([7], 0.0), ([8], 1.0), ([9], 2.0))], batch_size=2))

    assert [(example["completion_ids"], example["label"]) for example in examples] == [
        ([7], False),
        ([9], True),
    ]


def test_the_grade_of_a_single_answer_is_its_label() -> None:
    examples = unpaired_examples([row(([7], 1.0)), row(([8], -1.0))], batch_size=2)

    assert [(example["completion_ids"], example["label"]) for example in examples] == [
        ([7], True),
        ([8], False),
    ]


def test_kl_completions_come_from_other_answers_of_the_micro_batch() -> None:
    rows = [row(([7], 0.0), ([8], 1.0)), row(([5], 1.0), ([6], 0.0))]
    examples = list(unpaired_examples(rows, batch_size=2))

    assert [example["KL_completion_ids"] for example in examples] == [[8], [7], [6], [5]]


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("dpo", {"loss": ["kto", "sigmoid"]}, "kto and apo_zero_unpaired stand alone"),
        ("dpo", {"loss": ["sigmoid", "sigmoid"]}, "name each loss once"),
        ("dpo", {"loss": ["exo_pair"]}, "exo_pair needs a value above 0, such as 1e-3"),
        ("dpo", {"loss": ["hinge"], "label_smoothing": 0.1}, "only sigmoid, exo_pair"),
        ("dpo", {"loss_weights": [1.0, 2.0]}, "loss_weights has 2 numbers for 1 losses"),
        ("dpo", {"loss": ["sigmoidal"]}, "sigmoid"),
        ("run", {"dir": "s3://bucket/run"}, "set a folder that all workers share"),
        ("cluster", {"num_workers": [1, 2]}, "set one number"),
        ("train", {"audit": True}, "TRL decides the order of the samples"),
    ],
)
def test_contradictory_dpo_settings_are_refused(section: str, changes: dict, message: str) -> None:
    tree = {
        "run": {"dir": "/runs/dpo"},
        "model": {"name": "/runs/sft/model"},
        "data": {"sources": [{"name": "a", "paths": ["/a.jsonl"], "license": "CC0-1.0"}]},
    }
    validate(DPOConfig, tree)
    tree[section] = {**tree.get(section, {}), **changes}

    with pytest.raises(ConfigError, match=message):
        validate(DPOConfig, tree)

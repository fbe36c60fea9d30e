"""Training examples of DPO (pairs of answers) and KTO (labeled answers)."""

from collections.abc import Iterable, Iterator
from typing import Any

from medgpt.data.loader.epoch_order import VALIDATION
from medgpt.data.loader.packed_row import PackedRow
from medgpt.data.loader.plan import Plan
from medgpt.data.loader.stream import read_first_rows
from medgpt.runs import Run
from medgpt.train.loop import MAX_VALIDATION_ROWS


def read_all_rows(run: Run) -> tuple[list[PackedRow], list[PackedRow]]:
    """Return all samples of the first epoch in order, and those of the held-out split."""
    plan = Plan(run.plan.url, global_batch_size=1, max_steps=None)
    single_rank = {"rank": 0, "world_size": 1}
    return (
        read_first_rows(plan, run.data.url, epoch=0, limit=plan.num_rows[0], **single_rank),
        read_first_rows(
            plan, run.data.url, epoch=VALIDATION, limit=MAX_VALIDATION_ROWS, **single_rank
        ),
    )


def paired_examples(rows: Iterable[PackedRow]) -> Iterator[dict[str, list[int]]]:
    """Yield every pair of a better and a worse answer to the same prompt, as token ids."""
    for row in rows:
        answers = _graded_answers(row)
        for prompt, chosen, better in answers:
            for _, rejected, worse in answers:
                if better > worse:
                    yield {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


def unpaired_examples(rows: Iterable[PackedRow], *, batch_size: int) -> Iterator[dict[str, Any]]:
    """Yield answers, labeled True above the mean grade of their prompt and False below.

    The grade of a single answer is its label: 1 is good, -1 is bad.

    `KL_completion_ids` is another answer of the same micro-batch, on which KTO estimates the KL
    divergence to the reference (Ethayarajh et al., 2024, https://arxiv.org/abs/2402.01306, 4.1).
    """
    labeled = []
    for row in rows:
        answers = _graded_answers(row)
        mean = sum(grade for *_, grade in answers) / len(answers) if len(answers) > 1 else 0
        labeled += [(prompt, ids, grade > mean) for prompt, ids, grade in answers if grade != mean]
    for start in range(0, len(labeled), batch_size):
        batch = labeled[start : start + batch_size]
        for number, (prompt, ids, label) in enumerate(batch):
            yield {
                "prompt_ids": prompt,
                "completion_ids": ids,
                "KL_completion_ids": batch[number - 1][1],
                "label": label,
            }


def _graded_answers(row: PackedRow) -> list[tuple[list[int], list[int], float]]:
    """Return prompt ids, answer ids and grade of each answer."""
    assert row.sequence_lengths is not None
    assert row.grades is not None
    answers, start = [], 0
    for length, grade in zip(row.sequence_lengths.tolist(), row.grades.tolist(), strict=True):
        ids, prompt_length = row.input_ids[start : start + length], row.targets[start:].argmax()
        answers.append((ids[:prompt_length].tolist(), ids[prompt_length:].tolist(), grade))
        start += length
    return answers

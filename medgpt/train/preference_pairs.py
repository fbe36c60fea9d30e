"""What DPO and KTO learn from: the answers of the run's samples, as pairs or one by one."""

from collections.abc import Iterable, Iterator
from typing import Any

from medgpt.data.loader.order import VALIDATION
from medgpt.data.loader.packed_row import Row
from medgpt.data.loader.plan import Plan
from medgpt.data.loader.stream import first_rows
from medgpt.runs import Run
from medgpt.train.loop import VALIDATION_ROWS


def read_rows(run: Run) -> tuple[list[Row], list[Row]]:
    """All samples of the first epoch in its order, and of the held-out split."""
    plan = Plan(run.plan.url, global_batch_size=1, max_steps=None)
    whole = {"rank": 0, "world_size": 1}
    return (
        first_rows(plan, run.data.url, epoch=0, limit=plan.num_rows[0], **whole),
        first_rows(plan, run.data.url, epoch=VALIDATION, limit=VALIDATION_ROWS, **whole),
    )


def pairs(rows: Iterable[Row]) -> Iterator[dict[str, list[int]]]:
    """Each better answer with each worse one of the same prompt: `chosen_ids`, `rejected_ids`."""
    for row in rows:
        answers = _answers(row)
        for prompt, chosen, high in answers:
            for _, rejected, low in answers:
                if high > low:
                    yield {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


def singles(rows: Iterable[Row], *, batch_size: int) -> Iterator[dict[str, Any]]:
    """Answers better than the average of their prompt as True, worse ones as False.

    `KL_completion_ids` is another answer of the same micro-batch, on which KTO measures the
    distance to the reference (Ethayarajh et al., 2024, https://arxiv.org/abs/2402.01306, 4.1).
    """
    found = []
    for row in rows:
        answers = _answers(row)
        mean = sum(grade for *_, grade in answers) / len(answers)
        found += [(prompt, ids, grade > mean) for prompt, ids, grade in answers if grade != mean]
    for start in range(0, len(found), batch_size):
        batch = found[start : start + batch_size]
        for number, (prompt, ids, label) in enumerate(batch):
            yield {
                "prompt_ids": prompt,
                "completion_ids": ids,
                "KL_completion_ids": batch[number - 1][1],
                "label": label,
            }


def _answers(row: Row) -> list[tuple[list[int], list[int], float]]:
    """Ids of the prompt and of the answer, and its grade."""
    assert row.pieces is not None
    assert row.grades is not None
    found, start = [], 0
    for length, grade in zip(row.pieces.tolist(), row.grades.tolist(), strict=True):
        ids, first = row.input_ids[start : start + length], row.targets[start:].argmax()
        found.append((ids[:first].tolist(), ids[first:].tolist(), grade))
        start += length
    return found

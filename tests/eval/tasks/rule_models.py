"""Scores of models that answer by a rule."""

from collections.abc import Callable, Mapping
from typing import Any

from medgpt.eval.requests import GenerateResponse


def score_answers(
    task: Any, questions: Mapping[str, Any], answer: Callable[[Any], str]
) -> dict[str, float]:
    """Return the mean metrics of a model that replies `answer(question)`; `questions` by id."""
    responses = {
        request.id: GenerateResponse(request.id, [answer(questions[request.id])], [True])
        for request in task.requests()
    }
    sums: dict[str, list[float]] = {}
    for item in task.grade(responses):
        for name, value in item.values.items():
            assert isinstance(value, float)
            sums.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in sums.items()}

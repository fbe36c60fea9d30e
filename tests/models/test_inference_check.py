"""Generation and scores are those of a plain forward, whatever the model does in batches."""

import gc
import weakref

import pytest
import torch

from medgpt.models.decode import TokenGenerator
from medgpt.models.inference_check import ReadingMode, Row, find_mode, plain_logprobs
from medgpt.models.layout import random_texts
from medgpt.models.loglikelihood import LoglikelihoodScorer, PromptOptions
from medgpt.models.small_model import small_model
from tests.models.test_layout import plain_config
from tests.models.tiny_models import tiny_model

TYPES = ["llama", "minicpm3", "bloom", "mamba", "mamba2", "falcon_mamba", "rwkv", "jamba", "gpt2"]


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_generation_and_scores_are_those_of_a_plain_forward(model_type: str) -> None:
    config = plain_config(model_type, "clm")
    texts = [text.tolist() for text in random_texts(config)]
    model = small_model(config, "clm", torch.tensor([texts[-1]]))
    prompts = [texts[1], texts[0][:3], texts[0]]

    options = {"max_new_tokens": 5, "temperature": 1.0, "stop_token_ids": [7, 11, 20]}
    rows = TokenGenerator(model).generate(prompts, [1, 2, 3], **options)
    scorer = LoglikelihoodScorer(model, batch_tokens=256, window_tokens=64)
    scores = scorer.rolling_logprobs(prompts)
    choices = scorer.option_logprobs([PromptOptions(tuple(texts[1]), ((5, 6), (9,)))])

    for prompt, row, score in zip(prompts, rows, scores, strict=True):
        want = plain_logprobs(model, [*prompt, *row.ids])
        assert row.logprobs == pytest.approx(want[-len(row.ids) :].tolist(), abs=1e-3)
        assert score == pytest.approx(plain_logprobs(model, prompt).tolist(), abs=1e-3)
    for option, found in zip(((5, 6), (9,)), choices[0], strict=True):
        want = plain_logprobs(model, [*texts[1], *option])[-len(option) :].sum()
        assert found == pytest.approx(float(want), abs=1e-3)


def test_a_checked_model_is_not_kept_and_a_slower_mode_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_model("qwen2")
    model.set_attn_implementation("sdpa")  # it comes with the one for training
    modes: tuple[ReadingMode, ...] = ("batched", "plain")
    assert find_mode(model, modes, _failing_read) == "plain"
    assert "Qwen2ForCausalLM reads rows in the slower mode 'plain'" in caplog.text
    assert "batched reading raised ZeroDivisionError" in caplog.text
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None


def _failing_read(*_: object) -> list[Row]:
    raise ZeroDivisionError

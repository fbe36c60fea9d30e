"""Scores of options and texts equal those of a separate forward pass for each."""

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from medgpt.data.loader.packing import batches_by_length
from medgpt.models.loglikelihood import LoglikelihoodScorer, PromptOptions, sliding_windows
from tests.models.tiny_models import VOCAB, tiny_model

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def small_model(kind: str = "qwen2") -> PreTrainedModel:
    """Return a tiny model with the attention that is used for evaluation."""
    model = tiny_model(kind).eval()
    model.set_attn_implementation("sdpa")
    return model


def random_ids(generator: torch.Generator, low: int, high: int) -> tuple[int, ...]:
    length = int(torch.randint(low, high, (), generator=generator))
    return tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist())


def random_choices(count: int, *, shared: int, one_token: bool = False) -> list[PromptOptions]:
    generator = torch.Generator().manual_seed(1)
    beginning = tuple(torch.randint(3, VOCAB, (shared,), generator=generator).tolist())
    return [
        PromptOptions(
            beginning + random_ids(generator, 1, 20),
            tuple(random_ids(generator, 1, 2 if one_token else 9) for _ in range(2 + i % 4)),
        )
        for i in range(count)
    ]


@torch.inference_mode()
def reference_logprobs(model: PreTrainedModel, ids: tuple[int, ...]) -> Tensor:
    """Return the log-probabilities (L-1,) of all tokens but the first, from a plain forward."""
    row = torch.tensor([ids])
    logprobs = model(row).logits.float().log_softmax(-1)[0, :-1]
    return logprobs.gather(1, row[0, 1:, None])[:, 0]


def assert_scores_match_reference(
    model: PreTrainedModel, scorer: LoglikelihoodScorer, choices: list[PromptOptions]
) -> None:
    for choice, scores in zip(choices, scorer.option_logprobs(choices), strict=True):
        for option, score in zip(choice.options, scores, strict=True):
            expected = reference_logprobs(model, choice.prompt + option)[-len(option) :].sum()
            assert score == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("shared", [0, 30], ids=["nothing shared", "shared beginning"])
@pytest.mark.parametrize("one_token", [False, True], ids=["texts", "letters"])
def test_packed_options_score_as_in_separate_forwards(kind: str, shared: int, one_token: bool):
    model = small_model(kind)
    scorer = LoglikelihoodScorer(model, batch_tokens=256, window_tokens=64)
    assert scorer.can_pack_options
    choices = random_choices(13, shared=shared, one_token=one_token)
    assert_scores_match_reference(model, scorer, choices)


def test_equal_prompts_keep_their_last_token_out_of_the_cache():
    model = small_model()
    scorer = LoglikelihoodScorer(model, batch_tokens=256, window_tokens=64)
    prompt = tuple(range(3, 23))
    assert_scores_match_reference(
        model, scorer, [PromptOptions(prompt, ((5,), (6, 7))), PromptOptions(prompt, ((8,),))]
    )


def unusual_models() -> dict[str, PreTrainedModel]:
    """Return models with learned positions, a sliding window, and capped logits."""
    torch.manual_seed(0)
    gpt2 = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    window = MistralConfig(**SMALL, sliding_window=8, head_dim=8)
    wide = MistralConfig(**SMALL, sliding_window=16, head_dim=8)  # longer than the scorer's probe
    capped = Gemma2Config(
        **SMALL, head_dim=8, sliding_window=8, final_logit_softcapping=2.0, pad_token_id=0
    )
    return {
        "gpt2": GPT2LMHeadModel(gpt2),
        "mistral": MistralForCausalLM(window),
        "wide": MistralForCausalLM(wide),
        "gemma2": Gemma2ForCausalLM(capped),
    }


@pytest.mark.parametrize("name", ["gpt2", "mistral", "wide", "gemma2"])
def test_models_of_other_kinds_score_as_in_separate_forwards(name: str):
    model = unusual_models()[name].eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)  # fresh weights predict nearly the same everywhere
    scorer = LoglikelihoodScorer(model, batch_tokens=256, window_tokens=64)
    assert_scores_match_reference(model, scorer, random_choices(9, shared=20))
    text = random_ids(torch.Generator().manual_seed(2), 60, 61)
    assert scorer.rolling_logprobs([text])[0] == pytest.approx(
        reference_logprobs(model, text).tolist(), abs=1e-4
    )


def test_a_model_that_ignores_the_mask_scores_options_one_by_one():
    model = small_model()
    body = type(model.base_model)
    original = body.forward

    class Deaf(body):  # type: ignore[misc, valid-type]
        def forward(self, *args, attention_mask=None, **kwargs):
            return original(self, *args, **kwargs)

    model.base_model.__class__ = Deaf
    scorer = LoglikelihoodScorer(model, batch_tokens=256, window_tokens=64)
    assert not scorer.can_pack_options
    assert_scores_match_reference(model, scorer, random_choices(5, shared=20))


def test_texts_that_fit_the_window_score_as_in_separate_forwards():
    model = small_model()
    scorer = LoglikelihoodScorer(model, batch_tokens=100, window_tokens=64)
    generator = torch.Generator().manual_seed(3)
    texts = [random_ids(generator, 1, 64) for _ in range(12)]
    for text, found in zip(texts, scorer.rolling_logprobs(texts), strict=True):
        assert found == pytest.approx(reference_logprobs(model, text).tolist(), abs=1e-4)


def test_a_long_text_counts_each_token_once_with_half_a_window_before_it():
    model = small_model()
    scorer = LoglikelihoodScorer(model, batch_tokens=256, window_tokens=16)
    text = random_ids(torch.Generator().manual_seed(4), 50, 51)
    (found,) = scorer.rolling_logprobs([text])
    expected = reference_logprobs(model, text[:16]).tolist()
    for start in range(8, 42, 8):
        expected += reference_logprobs(model, text[start : start + 16]).tolist()[7:]
    assert len(expected) == 49
    assert found == pytest.approx(expected, abs=1e-4)


def test_windows_share_their_halves_and_nothing_is_new_twice():
    assert list(sliding_windows(10, 16)) == [(0, 10, 1)]
    assert list(sliding_windows(20, 8)) == [(0, 8, 1), (4, 12, 8), (8, 16, 12), (12, 20, 16)]
    assert list(sliding_windows(21, 8))[-1] == (16, 21, 20)
    assert list(sliding_windows(1, 8)) == []


def test_batches_hold_rows_of_similar_length_and_no_more_tokens_than_allowed():
    lengths = [5, 90, 40, 6, 41, 7]
    assert list(batches_by_length(lengths, 90)) == [[1], [4, 2], [5, 3, 0]]
    assert list(batches_by_length([200], 90)) == [[0]]


@pytest.mark.parametrize(
    "choice",
    [PromptOptions((), ((3,),)), PromptOptions((3,), ()), PromptOptions((3,), ((4,), ()))],
    ids=str,
)
def test_an_empty_prompt_or_option_is_refused(choice: PromptOptions):
    scorer = LoglikelihoodScorer(small_model(), batch_tokens=256, window_tokens=64)
    with pytest.raises(ValueError, match="is empty"):
        scorer.option_logprobs([choice])


def test_a_choice_longer_than_the_model_reads_is_refused():
    scorer = LoglikelihoodScorer(small_model(), batch_tokens=256, window_tokens=64)
    fits, too_long = ((3,) * 60, ((4,) * 5,)), ((3,) * 60, ((4,) * 6,))
    scorer.option_logprobs([PromptOptions(*fits)])
    with pytest.raises(ValueError, match="65 tokens, the model 64 positions"):
        scorer.option_logprobs([PromptOptions(*too_long)])

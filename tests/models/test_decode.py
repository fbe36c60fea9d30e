"""Generated ids and log-probabilities equal those of the model, in any batch."""

from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from medgpt.models.attention import VARLEN
from medgpt.models.decode import GeneratedResponse, TokenGenerator, sample_tokens, uniform_noise
from medgpt.models.policy import Policy
from tests.models.tiny_models import VOCAB, pack, tiny_model

LENGTHS = (3, 17, 1, 9, 9, 12, 5, 30, 2, 3)
NEVER = VOCAB + 1
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}


def model_of(kind: str) -> PreTrainedModel:
    """Return a tiny model in eval mode whose predictions differ between positions."""
    torch.manual_seed(1)
    match kind:
        case "mistral":  # a sliding window shorter than the sequences
            model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8))
        case "gemma2":  # windows in every other layer, logits transformed after the output layer
            model = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, sliding_window=8))
        case "gpt2":
            model = GPT2LMHeadModel(
                GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)
            )
        case _:
            model = tiny_model(kind, tie_embeddings=False)
    if kind not in ("qwen2", "llama"):  # transformers' fresh weights give all tokens similar logits
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4 if parameter.ndim > 1 else 1)
    model.set_attn_implementation("eager" if kind == "gemma2" else "sdpa")
    return model.eval()


def random_prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def sample(
    model: PreTrainedModel, prompts: list[list[int]], **changes: Any
) -> list[GeneratedResponse]:
    """Generate with stop tokens that end rows at many different lengths."""
    options = {"max_new_tokens": 20, "temperature": 1.0, "stop_token_ids": [5, 6]} | changes
    seeds = options.pop("seeds", range(len(prompts)))
    return TokenGenerator(model).generate(prompts, seeds, **options)


@pytest.mark.parametrize("kind", ["qwen2", "llama", "mistral", "gemma2", "gpt2"])
def test_greedy_ids_equal_those_of_transformers_generate(kind: str):
    model, prompts = model_of(kind), random_prompts()
    found = sample(model, prompts, temperature=0.0)
    for prompt, row in zip(prompts, found, strict=True):
        expected = model.generate(  # type: ignore[operator]
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=[5, 6],
            pad_token_id=0,
        )[0, len(prompt) :]
        assert row.ids == expected.tolist()
        assert row.finished == (row.ids[-1] in (5, 6))


@pytest.mark.parametrize("kind", ["qwen2", "mistral"])
def test_a_row_does_not_depend_on_its_batch(kind: str):
    model, prompts = model_of(kind), random_prompts()
    together = sample(model, prompts)
    lengths = {len(row.ids) for row in together}
    assert len(lengths) > 3  # rows end at different steps
    assert {row.finished for row in together} == {True, False}
    for i, prompt in enumerate(prompts):
        (alone,) = sample(model, [prompt], seeds=[i])
        assert alone.ids == together[i].ids
        assert alone.logprobs == pytest.approx(together[i].logprobs, abs=1e-5)
    split = TokenGenerator(model, batch_tokens=60)
    again = split.generate(
        prompts, range(10), max_new_tokens=20, temperature=1.0, stop_token_ids=[5, 6]
    )
    assert [row.ids for row in again] == [row.ids for row in together]


def test_noise_is_a_function_of_seed_and_position():
    model, prompt = model_of("qwen2"), random_prompts((6,))[0]
    first, same, other = sample(model, [prompt] * 3, seeds=[7, 7, 8], stop_token_ids=[NEVER])
    assert first == same
    assert first.ids != other.ids
    (short,) = sample(model, [prompt], seeds=[7], stop_token_ids=[NEVER], max_new_tokens=9)
    assert short.ids == first.ids[:9]
    assert not short.finished


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_a_training_forward(temperature: float):
    """Compare with the log-probabilities of packed rows at the same temperature."""
    model, prompts = model_of("qwen2"), random_prompts()
    found = sample(model, prompts, temperature=temperature)
    rows = [torch.tensor(p + row.ids) for p, row in zip(prompts, found, strict=True)]
    labels = [
        torch.cat([torch.full((len(p) - 1,), -100), torch.tensor(row.ids), torch.tensor([-100])])
        for p, row in zip(prompts, found, strict=True)
    ]
    model.set_attn_implementation(VARLEN)
    with torch.no_grad():
        expected, _ = Policy(model)(pack(rows, labels), temperature=temperature)
    logprobs = [x for row in found for x in row.logprobs]
    assert logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_samples_follow_the_distribution():
    scores = torch.tensor([2.0, 1.0, 0.0, -torch.inf, -1.0, -3.0])
    noise = uniform_noise(range(20_000), 1)[:, 0]
    tokens, logprobs = sample_tokens(scores.expand(len(noise), -1), noise, 0.7)
    expected = (scores / 0.7).softmax(-1)
    counts = tokens.bincount(minlength=6)
    assert counts[3] == 0
    possible = expected > 0
    wanted = expected[possible].double() * len(noise)
    assert chisquare(counts[possible], wanted / wanted.sum() * len(noise)).pvalue > 0.01
    assert logprobs.exp().tolist() == pytest.approx(expected[tokens].tolist(), rel=1e-5)


def test_the_largest_noise_draws_a_possible_token():
    scores = torch.full((2, 50_000), -20.0)
    scores[:, 10_000:] = -torch.inf
    noise = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert sample_tokens(scores, noise, 1.0)[0].tolist() == [0, 9_999]


def test_noise_is_uniform_and_reproducible():
    noise = uniform_noise([3, 2**64 + 3], 4000)
    assert float(noise.min()) >= 0
    assert float(noise.max()) < 1
    assert chisquare(torch.histc(noise.float(), 20, 0, 1)).pvalue > 0.01
    # a run that resumes after an update of numpy must get the same numbers
    assert noise[0, :2].tolist() == pytest.approx(
        [0.9342820204007575, 0.07916148013208679], abs=1e-15
    )
    assert noise[0, 0] != noise[1, 0]


def test_a_stream_yields_the_ids_of_a_batch():
    model, prompts = model_of("qwen2"), random_prompts()
    found = sample(model, prompts)
    options = {"max_new_tokens": 20, "temperature": 1.0, "stop_token_ids": [5, 6]}
    assert list(TokenGenerator(model).stream(prompts[1], 1, **options)) == found[1].ids
    assert torch.zeros(1, requires_grad=True).mul(2).requires_grad  # inference mode has ended


def test_empty_prompts_and_too_long_responses_are_refused():
    model = model_of("qwen2")
    with pytest.raises(ValueError, match="non-empty prompts"):
        sample(model, [[4], []])
    with pytest.raises(ValueError, match="need 70 positions, the model has 64"):
        sample(model, [[4] * 50])
    assert sample(model, []) == []

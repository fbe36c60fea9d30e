"""The packed loss equals that of the samples, however it is split, chunked or recomputed."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MiniCPM3Config, MiniCPM3ForCausalLM

from medgpt.config.base import ConfigError
from medgpt.data.loader.batch import PackedBatch
from medgpt.models.language_model import LanguageModel, neftune_noise
from tests.models.tiny_models import KINDS, VOCAB, pack, random_batch, tiny_model

MINICPM3 = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "dim_model_base": 16,
}


def loss_and_grads(model: LanguageModel, batch: PackedBatch, **kwargs):
    model.zero_grad()
    loss = model(batch, num_tokens=batch.num_targets or 1, **kwargs)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(first, second, **tolerance):
    torch.testing.assert_close(first[0], second[0], **tolerance)
    torch.testing.assert_close(first[1], second[1], **tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_loss_equals_transformers_own_loss_per_sample(kind):
    model, lengths = tiny_model(kind), [7, 2, 20]
    batch = random_batch(lengths)
    inputs, labels = (x[0].split(lengths) for x in (batch.input_ids, batch.labels))

    ours = LanguageModel(model)(batch, num_tokens=batch.num_targets)

    model.set_attn_implementation("sdpa")
    total = torch.zeros(())
    for piece, label in zip(inputs, labels, strict=True):
        num = (label != -100).sum()
        # transformers shifts causal labels itself: undo ours; the first is not predicted there
        theirs = label if kind == "bert" else torch.cat([torch.tensor([-100]), label])
        padded = piece if kind == "bert" else torch.cat([piece, torch.tensor([3])])
        total += model(padded[None], labels=theirs[None]).loss * num
    torch.testing.assert_close(ours, total / batch.num_targets, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_add_up_to_the_whole_batch(kind):
    model, batch = LanguageModel(tiny_model(kind)), random_batch([6, 9, 4])
    pieces, labels = (x[0].split([6, 9, 4]) for x in (batch.input_ids, batch.labels))

    whole = loss_and_grads(model, batch)
    model.zero_grad()
    loss = torch.zeros(())
    for part in ([0], [1, 2]):
        micro = pack([pieces[i] for i in part], [labels[i] for i in part])
        share = model(micro, num_tokens=torch.tensor(batch.num_targets))
        share.backward()
        loss += share.detach()

    grads = {name: p.grad for name, p in model.named_parameters()}
    assert_same((loss, grads), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_neither_loss_nor_gradient(kind, ignored):
    model, batch = tiny_model(kind), random_batch([6, 9, 4], ignored=ignored)

    whole = loss_and_grads(LanguageModel(model), batch)
    chunked = loss_and_grads(LanguageModel(model, loss_chunk_tokens=4), batch)
    even = loss_and_grads(LanguageModel(model, loss_chunk_tokens=3, max_batch_tokens=100), batch)

    assert_same(chunked, whole, atol=1e-6, rtol=1e-4)
    assert_same(even, whole, atol=1e-6, rtol=1e-4)


def test_the_output_layer_never_sees_more_than_a_chunk_and_only_labelled_tokens():
    model, batch = tiny_model(), random_batch([20, 20])
    seen = []
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))

    with torch.no_grad():
        LanguageModel(model, loss_chunk_tokens=8)(batch, num_tokens=1)

    assert sum(seen) == batch.num_targets < 40
    assert max(seen) <= 8


@pytest.mark.parametrize("lengths", [[20, 20], [1], [5]])
@pytest.mark.parametrize("ignored", [0.0, 1.0])
def test_with_a_largest_batch_given_every_forward_runs_the_same_number_of_chunks(lengths, ignored):
    model, calls = tiny_model(), []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    language_model = LanguageModel(model, loss_chunk_tokens=10, max_batch_tokens=40)

    loss_and_grads(language_model, random_batch(lengths, ignored=ignored))

    assert len(calls) == 2 * 4  # forward and recomputation


@pytest.mark.parametrize("max_batch_tokens", [None, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_labels_is_exactly_zero_and_reaches_every_weight(kind, max_batch_tokens):
    model = LanguageModel(tiny_model(kind), loss_chunk_tokens=8, max_batch_tokens=max_batch_tokens)

    loss, grads = loss_and_grads(model, random_batch([3, 5], ignored=1.0))

    assert loss.item() == 0.0
    assert all(not grad.any() for grad in grads.values())  # and none is None


@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_gives_equal_gradients(kind):
    batch = random_batch([6, 9])
    model = tiny_model(kind)

    plain = loss_and_grads(LanguageModel(copy.deepcopy(model)), batch)
    runs = []
    body = model.base_model
    layer = (body.encoder.layer if kind == "bert" else body.layers)[0]
    layer.register_forward_pre_hook(lambda *_: runs.append(1))  # outside the recomputed part
    inner = layer.intermediate if kind == "bert" else layer.mlp
    inner.register_forward_pre_hook(lambda *_: runs.append(1))
    recomputed = loss_and_grads(LanguageModel(model, activation_checkpointing=True), batch)

    assert_same(recomputed, plain)
    assert len(runs) == 1 + 2


def test_a_bf16_model_has_its_softmax_in_fp32():
    model, batch = tiny_model(dtype=torch.bfloat16), random_batch([20, 30], ignored=0.0)
    logits = []
    model.lm_head.register_forward_hook(lambda _, args, out: logits.append(out))

    loss = LanguageModel(model)(batch, num_tokens=50)
    loss.backward()

    assert logits[0].dtype == torch.bfloat16
    want = torch.nn.functional.cross_entropy(logits[0][0].double(), batch.labels[0])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(want.item(), abs=1e-5)  # bf16 has steps of 0.03 at 4
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}


def test_lora_trains_only_its_adapters_and_supports_chunks():
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny_model(), config)
    batch = random_batch([6, 9])

    def run(**kwargs):
        language_model = LanguageModel(model, **kwargs)
        language_model.zero_grad()
        loss = language_model(batch, num_tokens=batch.num_targets)
        loss.backward()
        trained = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        return loss.detach(), trained

    plain, recomputed = run(), run(loss_chunk_tokens=4, activation_checkpointing=True)

    assert_same(recomputed, plain, atol=1e-6, rtol=1e-4)
    assert all("lora_" in name and grad.any() for name, grad in plain[1].items())


def test_noise_is_a_function_of_a_sequences_seed_and_length():
    embeddings, bounds = torch.zeros(1, 30, 8), torch.tensor([0, 10, 30])

    noise = neftune_noise(embeddings, bounds, 5.0, [7, 8])
    swapped = neftune_noise(embeddings, torch.tensor([0, 20, 30]), 5.0, [8, 7])

    assert torch.equal(noise[:, :10], swapped[:, 20:])
    assert torch.equal(noise[:, 10:], swapped[:, :20])
    assert not torch.equal(noise[:, :10], neftune_noise(embeddings, bounds, 5.0, [9, 8])[:, :10])


def test_noise_is_uniform_up_to_the_papers_bound():
    noise = neftune_noise(torch.zeros(1, 500, 64), torch.tensor([0, 100, 500]), 5.0, [1, 2])

    for piece, length in ((noise[0, :100], 100), (noise[0, 100:], 400)):
        bound = 5.0 / (length * 64) ** 0.5
        assert 0.99 * bound < piece.abs().max() <= bound
        assert piece.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
        assert piece.mean().item() == pytest.approx(0.0, abs=0.05 * bound)


def test_noise_changes_the_training_loss_by_its_seed_and_is_absent_in_eval():
    model, batch = tiny_model(), random_batch([6, 9])
    plain, noisy = LanguageModel(model), LanguageModel(model, neftune_alpha=5.0)

    def loss(language_model, seeds=None):
        return language_model(batch, num_tokens=1, noise_seeds=seeds).item()

    assert loss(noisy, [1, 2]) == loss(noisy, [1, 2])
    assert len({loss(plain), loss(noisy, [1, 2]), loss(noisy, [1, 3])}) == 3
    noisy.eval()
    assert loss(noisy, [1, 2]) == loss(noisy) == loss(plain)


def test_noise_does_not_cut_the_embeddings_gradient():
    model = LanguageModel(tiny_model(tie_embeddings=False), neftune_alpha=5.0)

    _, grads = loss_and_grads(model, random_batch([6, 9]), noise_seeds=[1, 2])

    assert grads["model.model.embed_tokens.weight"].any()


@pytest.mark.parametrize("loss_chunk_tokens", [8192, 4])
def test_logits_are_scaled_as_in_the_models_own_forward(loss_chunk_tokens):
    config = MiniCPM3Config(**MINICPM3)
    assert config.hidden_size / config.dim_model_base == 4  # a property scales the logits by it
    torch.manual_seed(0)
    model = MiniCPM3ForCausalLM._from_config(config, attn_implementation="varlen")
    batch = random_batch([9, 5])

    loss = LanguageModel(model, loss_chunk_tokens=loss_chunk_tokens)(batch, num_tokens=1)

    model.set_attn_implementation("sdpa")
    pieces = zip(*(x[0].split([9, 5]) for x in (batch.input_ids, batch.labels)), strict=True)
    want = sum(
        torch.nn.functional.cross_entropy(model(ids[None]).logits[0], labels, reduction="sum")
        for ids, labels in pieces
    )
    torch.testing.assert_close(loss, want, atol=1e-4, rtol=1e-5)


def test_a_model_without_an_output_layer_is_refused():
    with pytest.raises(ConfigError, match="not a body followed by an output layer"):
        LanguageModel(tiny_model().model)


def test_one_step_of_training_lowers_the_loss():
    model, batch = LanguageModel(tiny_model("bert")), random_batch([10, 20])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    before, _ = loss_and_grads(model, batch)
    optimizer.step()

    assert model(batch, num_tokens=batch.num_targets) < before

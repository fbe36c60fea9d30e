"""Language-model losses against hand-computed values; masking against its statistics."""

import math

import pytest
import torch
import torch.nn.functional as F

from medgpt.algos.lm import causal_lm_loss, mask_tokens

NAN, MASK, VOCAB = float("nan"), 103, 1000


def test_two_labels_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0], [NAN, NAN]], requires_grad=True)

    loss = causal_lm_loss(logits, torch.tensor([1, 0, -100]), num_tokens=4)
    loss.backward()

    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 4)
    torch.testing.assert_close(
        logits.grad * 4, torch.tensor([[0.25, -0.25], [-0.5, 0.5], [0.0, 0.0]])
    )


def test_the_loss_equals_cross_entropy_without_a_shift():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 9), torch.randint(9, (3, 5))
    labels[:, :2] = -100

    loss = causal_lm_loss(logits, labels, num_tokens=torch.tensor(9))

    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def test_shards_add_up_to_the_whole_batch():
    logits, labels = torch.randn(4, 5, 9), torch.randint(9, (4, 5))

    whole = causal_lm_loss(logits, labels, num_tokens=20)
    shards = [causal_lm_loss(logits[s], labels[s], num_tokens=20) for s in ([0], [1, 2, 3])]

    torch.testing.assert_close(sum(shards), whole)


def test_without_labels_loss_and_gradient_are_exactly_zero():
    logits = torch.full((2, 3), NAN, requires_grad=True)

    loss = causal_lm_loss(logits, torch.full((2,), -100), num_tokens=7)
    loss.backward()

    assert loss.item() == 0.0
    assert logits.grad.tolist() == [[0.0] * 3] * 2


def masked(ids, special, *, seed=0, probability=0.15, word_ids=None):
    return mask_tokens(
        ids,
        special,
        mask_id=MASK,
        vocab_size=VOCAB,
        mlm_probability=probability,
        generator=torch.Generator().manual_seed(seed),
        word_ids=word_ids,
    )


@pytest.mark.parametrize("words", [False, True], ids=["tokens", "words"])
def test_15_percent_are_picked_of_which_80_10_10_are_masked_random_kept(words):
    ids = torch.full((100, 1000), 500)
    word_ids = torch.arange(1000).div(2, rounding_mode="floor").expand(100, -1) if words else None

    new, labels = masked(ids, torch.zeros_like(ids, dtype=torch.bool), word_ids=word_ids)
    picked = labels != -100
    became_mask, stayed = (new[picked] == MASK).float(), (new[picked] == 500).float()

    # five standard deviations of a binomial with 50 000 units, or 15 000 picked tokens
    assert picked.float().mean().item() == pytest.approx(0.15, abs=5 * 0.0016)
    assert became_mask.mean().item() == pytest.approx(0.8 + 0.1 / VOCAB, abs=5 * 0.0033)
    assert stayed.mean().item() == pytest.approx(0.1 + 0.1 / VOCAB, abs=5 * 0.0025)
    others = new[picked & (new != MASK) & (new != 500)]
    assert others.min() < 20
    assert 980 <= others.max() < VOCAB


def test_labels_hold_the_original_where_picked_and_nothing_else_changes():
    ids = torch.randint(VOCAB, (8, 50))
    before = ids.clone()

    new, labels = masked(ids, torch.zeros_like(ids, dtype=torch.bool), probability=0.5)
    picked = labels != -100

    assert torch.equal(ids, before)
    assert torch.equal(labels[picked], ids[picked])
    assert torch.equal(new[~picked], ids[~picked])
    assert (new[picked] != ids[picked]).any()


def test_special_tokens_are_never_picked_even_inside_a_word():
    ids = torch.randint(VOCAB, (50, 20))
    special = torch.rand(50, 20) < 0.5

    new, labels = masked(ids, special, probability=0.99, word_ids=torch.zeros_like(ids))

    assert (labels[special] == -100).all()
    assert torch.equal(new[special], ids[special])


def test_words_are_picked_whole_and_apart_from_equal_numbers_in_other_rows():
    ids = torch.randint(VOCAB, (40, 9))
    word_ids = torch.tensor([[-1, 0, 0, 1, 7, 7, 7, 1, -1]]).expand(40, -1)

    _, labels = masked(
        ids, torch.zeros_like(ids, dtype=torch.bool), probability=0.5, word_ids=word_ids
    )
    picked = labels != -100

    for word in ([1, 2], [3, 7], [4, 5, 6]):
        assert (picked[:, word] == picked[:, word[:1]]).all()
    columns = picked[:, [0, 1, 3, 4, 8]].T  # units draw independently: no two columns agree
    assert len({tuple(c.tolist()) for c in columns}) == 5


def test_replacements_are_drawn_per_token_not_per_word():
    ids = torch.full((200, 4), 500)

    new, labels = masked(
        ids,
        torch.zeros_like(ids, dtype=torch.bool),
        probability=0.5,
        word_ids=torch.zeros_like(ids),
    )
    became_mask = (new == MASK)[labels[:, 0] != -100]

    assert (became_mask.any(1) & ~became_mask.all(1)).any()


def test_masking_depends_only_on_the_generator():
    ids, special = torch.randint(VOCAB, (4, 30)), torch.zeros(4, 30, dtype=torch.bool)

    first = masked(ids, special, seed=1)
    torch.manual_seed(123)

    assert all(map(torch.equal, first, masked(ids, special, seed=1)))
    assert not torch.equal(first[1], masked(ids, special, seed=2)[1])

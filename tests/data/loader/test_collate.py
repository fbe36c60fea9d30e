import numpy as np
import torch

from medgpt.data.loader.batch import IGNORE
from medgpt.data.loader.collate import (
    MaskingSettings,
    causal_batch,
    empty_batch,
    masked_batch,
    sequence_seed,
    sequence_seeds,
)
from medgpt.data.loader.stream import PackedRow

CLS, SEP, MASK, VOCAB = 1, 2, 3, 1000
MASKING = MaskingSettings(
    mask_id=MASK, vocab_size=VOCAB, probability=0.15, special_ids=(0, CLS, SEP, MASK)
)


def make_row(
    *sequences: list[int], chunks: list[int] | None = None, names: str = "abcdefgh"
) -> PackedRow:
    """Tokens below 10 are context, the others targets."""
    tokens = [token for piece in sequences for token in piece]
    return PackedRow(
        input_ids=np.array(tokens, np.int32),
        targets=np.array([token >= 10 for token in tokens]),
        word_ids=None,
        lengths=np.array([len(piece) for piece in sequences]),
        sample_ids=list(names[: len(sequences)]),
        chunks=chunks or [0] * len(sequences),
        repeat=[0] * len(sequences),
    )


def document(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(10, VOCAB, length).tolist()


def test_every_target_position_predicts_the_next_token_of_its_sequence() -> None:
    # below 10: context
    batch = causal_batch([make_row([10, 11, 12], [5, 20]), make_row([6, 7, 30, 31, 8])])
    ignored = IGNORE
    assert batch.input_ids.tolist() == [[10, 11, 12, 5, 20, 6, 7, 30, 31, 8]]
    assert batch.labels.tolist() == [
        [11, 12, ignored, 20, ignored, ignored, 30, 31, ignored, ignored]
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3, 4]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 10]
    assert batch.max_seqlen == 5
    assert batch.num_targets == 5


def test_tensors_have_the_dtypes_that_the_kernels_need() -> None:
    batch = causal_batch([make_row([10, 11])])
    assert [t.dtype for t in (batch.input_ids, batch.position_ids, batch.labels)] == (
        [torch.int64] * 3
    )
    assert batch.cu_seqlens.dtype == torch.int32


def test_a_document_cut_in_two_trains_each_target_once() -> None:
    tokens = document(9)
    document_batch = causal_batch([make_row(tokens)])
    cut = causal_batch([make_row(tokens[:5], tokens[4:], chunks=[0, 1])])
    targets = [label for label in cut.labels[0].tolist() if label != IGNORE]
    assert targets == [label for label in document_batch.labels[0].tolist() if label != IGNORE]


def test_the_empty_batch_has_no_targets() -> None:
    batch = empty_batch(7)
    assert batch.num_targets == 0
    assert batch.input_ids.tolist() == [[7, 7]]


def masks(
    rows: list[PackedRow], epoch: int = 0
) -> dict[tuple[str, int], tuple[list[int], list[int]]]:
    """(sample, chunk) -> input ids and labels of the sequence."""
    batch = masked_batch(rows, MASKING, sequence_seeds(rows, seed=4, epoch=epoch))
    names = [(s, c) for row in rows for s, c in zip(row.sample_ids, row.chunks, strict=True)]
    bounds = batch.cu_seqlens.tolist()
    return {
        name: (batch.input_ids[0, a:b].tolist(), batch.labels[0, a:b].tolist())
        for name, a, b in zip(names, bounds[:-1], bounds[1:], strict=True)
    }


def test_masks_of_a_sequence_depend_neither_on_its_batch_nor_on_its_worker() -> None:
    sequences = [document(60, seed) for seed in range(4)]
    together = masks([make_row(*sequences)])
    apart = masks(
        [make_row(sequences[3], names="d"), make_row(sequences[1], sequences[0], names="ba")]
    )
    assert len(apart) == 3
    for name, masked in apart.items():
        assert masked == together[name]


def test_masks_differ_between_epochs_samples_and_chunks() -> None:
    tokens = document(200)
    rows = [make_row(tokens, tokens, tokens, chunks=[0, 1, 0], names="aab")]
    labels = [piece[1] for epoch in range(3) for piece in masks(rows, epoch).values()]
    assert len({tuple(label) for label in labels}) == 9


def test_seeds_differ_between_runs_epochs_samples_chunks_and_repeats() -> None:
    base = (0, 0, "a", 0, 0)
    other_seeds = [
        (1, 0, "a", 0),
        (0, 1, "a", 0),
        (0, 0, "b", 0),
        (0, 0, "a", 1),
        (0, 0, "a", 0, 1),
    ]
    assert len({sequence_seed(*key) for key in [base, *other_seeds]}) == 6
    assert all(0 <= sequence_seed(*key) < 2**63 for key in other_seeds)


def test_about_15_percent_is_masked_and_never_a_special_token() -> None:
    rows = [make_row([CLS, *document(400, seed), SEP], names=str(seed)) for seed in range(9)]
    inputs, labels = zip(*masks(rows).values(), strict=True)
    picked = [label != IGNORE for piece in labels for label in piece]
    assert 0.12 < sum(picked) / len(picked) < 0.18
    for row, ids, label in zip(rows, inputs, labels, strict=True):
        assert (ids[0], ids[-1], label[0], label[-1]) == (CLS, SEP, IGNORE, IGNORE)
        unmasked = [i for i, target in enumerate(label) if target == IGNORE]
        assert [ids[i] for i in unmasked] == row.input_ids[unmasked].tolist()


def test_the_token_that_two_chunks_share_is_masked_in_the_first_only() -> None:
    always = MaskingSettings(mask_id=MASK, vocab_size=VOCAB, probability=0.999999, special_ids=())
    tokens = document(9)
    row = make_row(tokens[:5], tokens[4:], chunks=[0, 1])
    labels = masked_batch([row], always, sequence_seeds([row], seed=0, epoch=0)).labels[0].tolist()
    assert labels == [*tokens[:5], IGNORE, *tokens[5:]]


def test_words_are_masked_as_a_whole() -> None:
    tokens = document(300)
    words = np.repeat(np.arange(100), 3).astype(np.int32)
    plain = make_row(tokens)
    row = PackedRow(**{**vars(plain), "word_ids": words})
    labels = masked_batch([row], MASKING, [5]).labels[0].reshape(100, 3) != IGNORE
    assert 5 < labels.all(1).sum() == labels.any(1).sum() < 30

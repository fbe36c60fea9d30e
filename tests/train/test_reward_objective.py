"""The reward objective: pairs, losses on several ranks, normalization and evaluation."""

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from medgpt.config.base import ConfigError
from medgpt.config.loading import validate
from medgpt.config.reward_model import RewardModelConfig
from medgpt.data.loader.collate import preference_batch
from medgpt.data.loader.epoch_order import VALIDATION
from medgpt.data.loader.stream import PackedRow
from medgpt.engine import Engine
from medgpt.models.tokenizer import load_tokenizer
from medgpt.models.value_model import last_token_values
from medgpt.train.policy_samples import sample_policy_answers
from medgpt.train.preparation import make_tokenizer
from medgpt.train.reward_eval import ScoredPair, evaluate_pairs, scored_pairs
from medgpt.train.reward_objective import RewardObjective
from tests.engine.ranks import start_ranks

CPU = torch.device("cpu")
GRADES = [[1.0, 0.0], [3.0, 1.0, 2.0, 1.0], [0.0, 1.0]]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    with start_ranks(tmp_path_factory.mktemp("ranks") / "store") as run:
        yield run


def rows() -> list[PackedRow]:
    """Return three prompts of four tokens with 2, 4 and 2 answers."""
    generator = np.random.default_rng(0)
    rows_list = []
    for number, grades in enumerate(GRADES):
        prompt = generator.integers(5, 300, 4)
        answers = [generator.integers(5, 300, 2 + 3 * n) for n in range(len(grades))]
        pieces = [np.concatenate([prompt, answer]) for answer in answers]
        lengths = np.array([len(piece) for piece in pieces], np.int32)
        targets = np.concatenate([np.arange(length) >= 4 for length in lengths])
        rows_list.append(
            PackedRow(
                input_ids=np.concatenate(pieces).astype(np.int32),
                targets=targets,
                word_ids=None,
                lengths=np.array([lengths.sum()]),
                sample_ids=[f"sample {number}"],
                chunks=[0],
                repeat=[0],
                sequence_lengths=lengths,
                grades=np.array(grades, np.float32),
            )
        )
    return rows_list


def config(base: Path, **sections: Any) -> RewardModelConfig:
    tree: dict[str, Any] = {
        "run": {"dir": "runs/x"},
        "model": {"name": str(base)},
        "data": {
            "sources": [{"name": "a", "paths": ["x"], "license": "MIT"}],
            "max_length": 64,
        },
        "optimizer": {"learning_rate": 1e-3, "max_grad_norm": 0.0},
    }
    return validate(RewardModelConfig, tree | sections)


def make_objective(settings: RewardModelConfig) -> RewardObjective:
    return RewardObjective(settings, load_tokenizer(str(settings.model.name)), CPU)


def make_engine(settings: RewardModelConfig, objective: RewardObjective) -> Engine:
    return Engine(
        objective.module,
        engine=settings.engine,
        optimizer=settings.optimizer,
        total_steps=5,
        device=CPU,
    )


def test_every_unequal_pair_counts_weighted_by_the_number_of_pairs() -> None:
    batch = preference_batch(rows())

    assert batch.num_targets == 3
    assert batch.packed.cu_seqlens.diff().tolist() == [6, 9, 6, 9, 12, 15, 6, 9]
    pairs = list(zip(batch.better.tolist(), batch.worse.tolist(), strict=True))
    assert pairs == [(0, 1), (2, 3), (2, 4), (2, 5), (4, 3), (4, 5), (7, 6)]  # 3 and 5 are equal
    assert batch.margins.tolist() == [1.0, 2.0, 1.0, 2.0, 1.0, 1.0, 1.0]
    torch.testing.assert_close(batch.weights, torch.tensor([1.0, *[1 / 6] * 5, 1.0]))


def test_the_loss_is_the_mean_over_prompts_of_their_weighted_pairs(base: Path) -> None:
    settings = config(base, objective={"margin_coef": 0.5})
    objective = make_objective(settings)
    batch = objective.collate(rows(), epoch=0)
    with torch.no_grad():
        scores = last_token_values(objective.module(batch.packed), batch.packed).tolist()
        loss, sums = objective.loss(make_engine(settings, objective), batch, num_targets=3.0)

    def cost(better: int, worse: int, margin: float) -> float:
        return math.log(1 + math.exp(margin - scores[better] + scores[worse]))

    ranked = [(2, 3, 1.0), (2, 4, 0.5), (2, 5, 1.0), (4, 3, 0.5), (4, 5, 0.5)]
    by_hand = cost(0, 1, 0.5) + sum(cost(*pair) for pair in ranked) / 6 + cost(7, 6, 0.5)
    assert float(loss) == pytest.approx(by_hand / 3, abs=1e-6)

    leads = [scores[a] - scores[b] for a, b in zip(batch.better, batch.worse, strict=True)]
    right = sum(lead > 0 for lead in leads)
    assert objective.metrics(sums.tolist(), held_out=False) == {
        "reward/accuracy": pytest.approx(right / 7),
        "reward/margin": pytest.approx(sum(leads) / 7, abs=1e-6),
    }


def losses(settings: RewardModelConfig, shares: list[list[int]]) -> list[tuple[float, float]]:
    """Return loss and gradient norm of three steps, with the rows distributed over the ranks."""
    objective = make_objective(settings)
    engine = make_engine(settings, objective)
    rank_rows = [rows()[number] for number in shares[dist.get_rank()]]
    results = []
    for _ in range(3):
        total = torch.zeros(())
        for start in range(2):  # the same number of forward passes on every rank
            part = rank_rows[start : start + 1] if start == 0 else rank_rows[1:]
            batch = objective.collate(part, epoch=0)
            options = objective.loss_kwargs(part, epoch=0)
            loss, _ = objective.loss(engine, batch, num_targets=3.0, **options)
            engine.backward(loss)
            total += loss.detach()
        norm = engine.step()
        dist.all_reduce(total)
        results.append((float(total), norm))
    return results


def all_settings(base: Path) -> list[RewardModelConfig]:
    lora = {"name": str(base), "lora": {"rank": 2, "dropout": 0.3}}
    full = [config(base, engine={"zero_stage": stage}) for stage in range(4)]
    return [*full, config(base, model=lora, engine={"zero_stage": 2})]


def all_losses(settings_list: list[RewardModelConfig], shares: list[list[int]]) -> list[Any]:
    return [losses(settings, shares) for settings in settings_list]


def test_gradients_of_several_ranks_equal_those_of_one(
    base: Path, two_ranks: Callable[..., list[Any]]
) -> None:
    settings_list = all_settings(base)
    alone = all_losses(settings_list, [[0, 1, 2]])
    together, _ = two_ranks(all_losses, settings_list, [[1], [2, 0]])
    unequal, _ = two_ranks(all_losses, settings_list, [[0, 1, 2], []])

    assert alone[0][2][0] < alone[0][0][0]
    for number, expected in enumerate(alone):
        same = alone[0] if number < 4 else expected
        for result in (expected, together[number], unequal[number]):
            np.testing.assert_allclose(result, same, rtol=1e-4, atol=1e-5)


def test_scored_pairs_hold_margin_and_length_gap() -> None:
    scores = torch.tensor([2.0, -1.0, 0.5, 0.0])
    pairs = scored_pairs(rows()[1], scores)

    assert [pair.margin for pair in pairs] == [3.0, 1.5, 2.0, 1.5, 0.5]
    # 2, 5, 8 and 11 tokens after the prompt
    expected_differences = [(2 - 5) / 5, (2 - 8) / 8, (2 - 11) / 11, (8 - 5) / 8, (8 - 11) / 11]
    assert [pair.length_gap for pair in pairs] == pytest.approx(expected_differences)


def test_accuracy_by_source_and_by_length() -> None:
    pairs = [
        ScoredPair("0", 1.0, 0.9),
        ScoredPair("0", 2.0, 0.05),
        ScoredPair("1", -1.0, -0.9),
        ScoredPair("1", 0.0, 1.0),
    ]
    evaluation = evaluate_pairs(pairs, {"0": "a", "1": "b", "2": "a"})

    assert (evaluation["pairs"], evaluation["samples"], evaluation["accuracy"]) == (4, 2, 0.5)
    assert [s["accuracy"] for s in evaluation["by_source"]] == [1.0, 0.0]
    assert [s["pairs"] for s in evaluation["by_length"]] == [1, 0, 1, 0, 2]
    assert [s["accuracy"] for s in evaluation["by_length"]] == [0.0, None, 1.0, None, 0.5]
    assert sum(evaluation["leads"]["counts"]) == 4


def test_policy_answers_continue_the_prompt_and_depend_on_the_sample_id(base: Path) -> None:
    settings = config(base, objective={"normalize_on": "own", "max_new_tokens": 6})
    tokenizer = load_tokenizer(str(base))

    def answers(chosen: list[PackedRow]) -> list[list[int]]:
        samples = sample_policy_answers(settings, tokenizer, CPU, chosen)
        assert [row.sequence_lengths.tolist() for row in samples] == [
            row.lengths.tolist() for row in samples
        ]
        return [row.input_ids.tolist() for row in samples]

    together = answers(rows())
    assert [ids[:4] for ids in together] == [row.input_ids[:4].tolist() for row in rows()]
    assert all(4 < len(ids) <= 10 for ids in together)
    twice = [rows()[0], replace(rows()[0], sample_ids=["another of the same prompt"])]
    assert answers(twice)[0] == together[0] != answers(twice)[1]
    assert answers(rows()[1:]) == together[1:]
    assert (
        preference_batch(sample_policy_answers(settings, tokenizer, CPU, rows())).num_targets == 3
    )


class FakeTrainer:
    """The methods of a Trainer that `on_train_end` calls, without a run."""

    def __init__(self, settings: RewardModelConfig, objective: RewardObjective) -> None:
        self.objective, self.engine = objective, make_engine(settings, objective)

    def first_rows(self, *, epoch: int, limit: int) -> list[PackedRow]:
        return rows()[dist.get_rank() :: dist.get_world_size()]

    def validation_micro_batches(self, chosen: list[PackedRow]) -> list[Any]:
        num_rows = 3 if dist.get_world_size() == 1 else 2
        parts = [chosen[i : i + 1] for i in range(num_rows)]
        return [(self.objective.collate(part, epoch=VALIDATION), {}) for part in parts]


def fitted_normalization(base: Path, normalize_on: str) -> tuple[float, float]:
    objective_section = {"normalize_on": normalize_on, "max_new_tokens": 6}
    settings = config(base, objective=objective_section)
    objective = make_objective(settings)
    trainer: Any = FakeTrainer(settings, objective)
    score = objective.fit_score_normalization(trainer)
    assert score.normalised_on == normalize_on
    return score.mean, score.std


def test_scores_are_normalized_on_policy_samples(
    base: Path, two_ranks: Callable[..., list[Any]]
) -> None:
    settings = config(base, objective={"normalize_on": "own", "max_new_tokens": 6})
    objective = make_objective(settings)
    answers = sample_policy_answers(settings, objective.tokenizer, CPU, rows())
    batch = objective.collate(answers, epoch=0).packed
    with torch.no_grad():
        scores = last_token_values(objective.module.eval()(batch), batch)
    expected = float(scores.mean()), float(scores.std(correction=0))
    for result in (
        fitted_normalization(base, "own"),
        *two_ranks(fitted_normalization, base, "own"),
    ):
        assert result == pytest.approx(expected, abs=1e-5)
    assert fitted_normalization(base, "chosen") != pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"architecture": {}}, "tokenizer": {"mode": "train"}}, "medgpt sft wrote"),
        ({"tokenizer": {"mode": "extend"}}, "tokenizer.mode=extend"),
        ({"train": {"neftune_alpha": 5.0}}, "train.neftune_alpha=5"),
        ({"report": {"prompts": ["x"]}}, "report.prompts"),
    ],
)
def test_settings_a_reward_model_does_not_support_are_refused(
    base: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(base, **sections)


def test_a_base_without_chat_template_is_refused(base: Path, tmp_path: Path) -> None:
    plain = Path(shutil.copytree(base, tmp_path / "plain"))
    (plain / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        make_tokenizer(str(tmp_path / "tokenizer"), config(plain))

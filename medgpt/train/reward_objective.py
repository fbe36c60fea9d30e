"""What the reward stage teaches: the better of two answers to a prompt has the higher score."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from medgpt.algos.preference import pairwise_loss
from medgpt.config.reward_model import RewardConfig
from medgpt.data.loader.batch import PreferenceBatch
from medgpt.data.loader.collate import empty_preferences, piece_seed, preference_batch
from medgpt.data.loader.order import VALIDATION
from medgpt.data.loader.packed_row import Row
from medgpt.engine import Engine
from medgpt.engine.value import trainable_value_model
from medgpt.models.tokenizer_compat import speech
from medgpt.models.value_model import Score, last_values
from medgpt.train.export import export_model
from medgpt.train.loop import Loss, Trainer
from medgpt.train.policy_samples import own_answers
from medgpt.train.reward_eval import (
    FINDINGS,
    HELD_OUT_PROMPTS,
    Compared,
    compared,
    findings,
    held_out_sources,
)


class RewardObjective:
    """Scores of answers at their last token, and the pairwise loss over all pairs of a prompt.

    A prompt with K answers weighs each of its pairs 1 / C(K, 2); the loss is a mean over prompts.
    """

    num_counts = 3  # pairs, those in the right order, sum of the leads

    def __init__(self, config: RewardConfig, tokenizer: Any, device: torch.device) -> None:
        self.config, self.tokenizer, self.device = config, tokenizer, device
        self.seed = config.run.seed
        self.module = trainable_value_model(
            config.model,
            config.engine,
            device,
            seed=self.seed,
            max_length=config.data.max_length,
            normalised=False,
        )
        self.score: Score | None = None  # after `finish`

    def batch(self, rows: Sequence[Row], *, epoch: int) -> PreferenceBatch:
        return preference_batch(rows)

    def empty_batch(self) -> PreferenceBatch:
        return empty_preferences(0)

    def loss_options(self, rows: Sequence[Row], *, epoch: int) -> dict[str, Any]:
        if not self.config.model.lora.dropout:
            return {}
        seeds = [
            piece_seed(self.seed, epoch, row.sample_ids[0], answer, row.repeat[0])
            for row in rows
            for answer in range(num_answers(row))
        ]
        return {"noise_seeds": seeds or [0]}  # the empty batch is one piece

    def loss(
        self, engine: Engine, batch: PreferenceBatch, *, num_targets: float, **options: Any
    ) -> Loss:
        scores = self._scores(engine, batch, **options)
        better, worse = scores[batch.better], scores[batch.worse]
        share, _ = pairwise_loss(
            better,
            worse,
            num_pairs=torch.tensor(num_targets, device=scores.device),
            margin=self.config.objective.margin_coef * batch.leads,
            weights=batch.weights,
        )
        leads = (better - worse).detach()
        counts = [torch.ones_like(leads).sum(), (leads > 0).float().sum(), leads.sum()]
        return Loss(share, torch.stack(counts))

    def metrics(self, counts: Sequence[float], *, held_out: bool) -> dict[str, float]:
        pairs, right, leads = counts
        if not pairs:
            return {}
        if held_out:
            return {"validation/accuracy": right / pairs, "validation/margin": leads / pairs}
        return {"reward/accuracy": right / pairs, "reward/margin": leads / pairs}

    def finish(self, trainer: Trainer) -> None:
        """Find what scores are relative to, and how well pairs are told apart. Collective."""
        self.score = self.normalisation(trainer)
        held_out = trainer.first_rows(epoch=VALIDATION, limit=HELD_OUT_PROMPTS)
        scores = self._all_scores(trainer, held_out)
        pairs: list[Compared] = gathered(
            [
                pair
                for row, found in zip(held_out, scores, strict=True)
                for pair in compared(row, (found - self.score.mean) / self.score.std)
            ]
        )
        if dist.get_rank() == 0:
            found = findings(pairs, held_out_sources(trainer.run))
            trainer.run.folder.write_json(FINDINGS, {"score": asdict(self.score), **found})

    def normalisation(self, trainer: Trainer) -> Score:
        """Mean and deviation of the scores of the chosen or of own answers. Collective."""
        goal = self.config.objective
        trainer.engine.module.eval()
        rows = trainer.first_rows(epoch=0, limit=goal.normalise_prompts)
        if goal.normalise_on == "own":
            rows = own_answers(self.config, self.tokenizer, self.device, rows)
        scores = self._all_scores(trainer, rows)
        # of own answers there is one each
        chosen = [float(found[best_answer(row)]) for row, found in zip(rows, scores, strict=True)]
        everywhere = torch.tensor(gathered(chosen))
        return Score(
            mean=float(everywhere.mean()),
            std=float(everywhere.std(correction=0)) or 1.0,
            normalised_on=goal.normalise_on,
            speech=speech(self.tokenizer),
        )

    def export(self, engine: Engine, directory: Path) -> None:
        """Write a Hugging Face folder (an adapter folder under LoRA) and score.json. Collective."""
        assert self.score is not None, "finish comes first"
        export_model(engine, self.module.model, self.tokenizer, directory)
        if dist.get_rank() == 0:
            self.score.write(directory)

    def _scores(self, engine: Engine, batch: PreferenceBatch, **options: Any) -> Tensor:
        """(S,) float32 of all answers in the batch, as the head gives them."""
        return last_values(engine(batch.packed, **options), batch.packed)

    @torch.no_grad()
    def _all_scores(self, trainer: Trainer, rows: Sequence[Row]) -> list[Tensor]:
        """(K,) scores of each row's answers, on the CPU. Collective."""
        batches = trainer.micro_batches(rows, num_rows=trainer.most_rows(rows), epoch=VALIDATION)
        found = [self._scores(trainer.engine, batch, **options).cpu() for batch, options in batches]
        sizes = [num_answers(row) for row in rows]
        flat = torch.cat(found)[: sum(sizes)] if found else torch.zeros(0)  # then empty batches
        return list(flat.split(sizes)) if sizes else []


def num_answers(row: Row) -> int:
    assert row.pieces is not None
    return len(row.pieces)


def best_answer(row: Row) -> int:
    assert row.grades is not None
    return int(row.grades.argmax())


def gathered(mine: list[Any]) -> list[Any]:
    """The lists of all ranks, end to end. Collective."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return [item for part in everyone for item in part]

"""Objective of the reward stage: the better of two answers gets the higher score."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from medgpt.algos.preference import pairwise_loss
from medgpt.config.reward_model import RewardModelConfig
from medgpt.data.loader.batch import PreferenceBatch
from medgpt.data.loader.collate import empty_preference_batch, preference_batch, sequence_seed
from medgpt.data.loader.epoch_order import VALIDATION
from medgpt.data.loader.packed_row import PackedRow
from medgpt.engine import Engine
from medgpt.engine.build import build_trainable_value_model
from medgpt.models.tokenizer_compat import tokenizer_fingerprint
from medgpt.models.value_model import RewardModelInfo, last_token_values
from medgpt.train import reward_eval
from medgpt.train.collectives import all_gather_items
from medgpt.train.export import export_model
from medgpt.train.loop import Trainer
from medgpt.train.policy_samples import sample_policy_answers


class RewardObjective:
    """Pairwise loss on the scores of answers, taken at their last token.

    Each pair of a prompt with K answers weighs 1 / C(K, 2); the loss is a mean over prompts.
    """

    num_metric_sums = 3  # number of pairs, of pairs in the right order, sum of margins

    def __init__(self, config: RewardModelConfig, tokenizer: Any, device: torch.device) -> None:
        self.config, self.tokenizer, self.device = config, tokenizer, device
        self.seed = config.run.seed
        self.module = build_trainable_value_model(
            config.model,
            config.engine,
            device,
            seed=self.seed,
            max_length=config.data.max_length,
            normalized=False,
            packing=config.data.packing,
        )
        self.reward_model_info: RewardModelInfo | None = None  # set by on_train_end

    def collate(self, rows: Sequence[PackedRow], *, epoch: int) -> PreferenceBatch:
        return preference_batch(rows) if rows else empty_preference_batch(0)

    def loss_kwargs(self, rows: Sequence[PackedRow], *, epoch: int) -> dict[str, Any]:
        if not self.config.model.lora.dropout:
            return {}
        seeds = [
            sequence_seed(self.seed, epoch, row.sample_ids[0], answer, row.repeat[0])
            for row in rows
            for answer in range(num_answers(row))
        ]
        return {"noise_seeds": seeds or [0]}  # the empty batch has one sequence

    def loss(
        self, engine: Engine, batch: PreferenceBatch, *, num_targets: float, **options: Any
    ) -> tuple[Tensor, Tensor]:
        scores = self._scores(engine, batch, **options)
        better, worse = scores[batch.better], scores[batch.worse]
        loss, _ = pairwise_loss(
            better,
            worse,
            num_pairs=torch.tensor(num_targets, device=scores.device),
            margin=self.config.objective.margin_coef * batch.margins,
            weights=batch.weights,
        )
        margins = (better - worse).detach()
        metric_sums = [torch.ones_like(margins).sum(), (margins > 0).float().sum(), margins.sum()]
        return loss, torch.stack(metric_sums)

    def metrics(self, metric_sums: Sequence[float], *, held_out: bool) -> dict[str, float]:
        num_pairs, num_correct, margin_sum = metric_sums
        if not num_pairs:
            return {}
        if held_out:
            return {
                "validation/accuracy": num_correct / num_pairs,
                "validation/margin": margin_sum / num_pairs,
            }
        return {"reward/accuracy": num_correct / num_pairs, "reward/margin": margin_sum / num_pairs}

    def on_train_end(self, trainer: Trainer) -> None:
        """Fit the score normalization and evaluate held-out pairs. Collective."""
        info = self.reward_model_info = self.fit_score_normalization(trainer)
        rows = trainer.first_rows(epoch=VALIDATION, limit=reward_eval.MAX_HELD_OUT_PROMPTS)
        pairs = all_gather_items(
            [
                pair
                for row, scores in zip(rows, self._score_rows(trainer, rows), strict=True)
                for pair in reward_eval.scored_pairs(row, (scores - info.mean) / info.std)
            ]
        )
        if dist.get_rank() == 0:
            evaluation = reward_eval.evaluate_pairs(
                pairs, reward_eval.held_out_source_names(trainer.run)
            )
            trainer.run.folder.write_json(
                reward_eval.REWARD_EVAL_FILE, {"score": asdict(info), **evaluation}
            )

    def fit_score_normalization(self, trainer: Trainer) -> RewardModelInfo:
        """Return mean and deviation of the scores of chosen or of sampled answers. Collective."""
        objective_config = self.config.objective
        trainer.engine.module.eval()
        rows = trainer.first_rows(epoch=0, limit=objective_config.normalize_prompts)
        if objective_config.normalize_on == "own":
            rows = sample_policy_answers(self.config, self.tokenizer, self.device, rows)
        scores = self._score_rows(trainer, rows)
        # a policy sample is the only answer of its row
        chosen = [
            float(row_scores[best_answer_index(row)])
            for row, row_scores in zip(rows, scores, strict=True)
        ]
        all_scores = torch.tensor(all_gather_items(chosen))
        return RewardModelInfo(
            mean=float(all_scores.mean()),
            std=float(all_scores.std(correction=0)) or 1.0,
            normalised_on=objective_config.normalize_on,
            speech=tokenizer_fingerprint(self.tokenizer),
        )

    def export(self, engine: Engine, directory: Path) -> None:
        """Write a Hugging Face folder (LoRA: an adapter) and score.json. Collective."""
        assert self.reward_model_info is not None, "on_train_end comes first"
        export_model(self.module.model, self.tokenizer, directory)
        if dist.get_rank() == 0:
            self.reward_model_info.write(directory)

    def _scores(self, engine: Engine, batch: PreferenceBatch, **options: Any) -> Tensor:
        """Return the raw scores (S,) float32 of all answers in the batch."""
        return last_token_values(engine(batch.packed, **options), batch.packed)

    @torch.no_grad()
    def _score_rows(self, trainer: Trainer, rows: Sequence[PackedRow]) -> list[Tensor]:
        """Return the scores (K,) of each row's answers, on the CPU. Collective."""
        scores = [
            self._scores(trainer.engine, batch, **kwargs).cpu()
            for batch, kwargs in trainer.validation_micro_batches(rows)
        ]
        sizes = [num_answers(row) for row in rows]
        flat = torch.cat(scores)[: sum(sizes)] if scores else torch.zeros(0)  # batches may be empty
        return list(flat.split(sizes)) if sizes else []


def num_answers(row: PackedRow) -> int:
    assert row.sequence_lengths is not None
    return len(row.sequence_lengths)


def best_answer_index(row: PackedRow) -> int:
    assert row.grades is not None
    return int(row.grades.argmax())

"""The critic role: the value function, before each response token."""

import math

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from medgpt.algos.ppo import ppo_value_loss
from medgpt.artifacts import FileEntry, Folder, file_entries
from medgpt.config.ppo import PPOStageConfig
from medgpt.data.loader.batch import IGNORE, PackedBatch
from medgpt.engine import Engine
from medgpt.engine.build import build_trainable_value_model
from medgpt.models.tokenizer import load_tokenizer
from medgpt.models.tokenizer_compat import check_same_token_ids
from medgpt.models.value_model import ValueScale, last_token_values
from medgpt.rlhf.batching import RowIndices
from medgpt.rlhf.experience import Experience, make_experience
from medgpt.rlhf.preflight import initial_critic
from medgpt.rlhf.roles.common import (
    UpdateTask,
    all_reduce,
    errors_for_key,
    local_forward_passes,
    optimizer_step_rows,
    role_device,
    token_positions,
)
from medgpt.rlhf.rollout_batch import Logprobs, Scores, Sequences, Values, join_sequences
from medgpt.train.export import export_model


class Critic:
    """One rank of the critic: PPO's value update, independent of Ray."""

    def __init__(self, config: PPOStageConfig, *, total_iterations: int) -> None:
        self.config, self.device = config, role_device()
        engine = config.pools.critic.engine
        actor = config.model.name
        assert actor is not None
        key, start = initial_critic(config)
        model = config.model.with_name(start).model_copy(update={"lora": config.critic.lora})
        remote = config.model.trust_remote_code
        with errors_for_key(key):
            check_same_token_ids(
                load_tokenizer(actor, remote),
                load_tokenizer(start, remote),
                names=("the actor", f"{key}={start}"),
            )
            self.model = build_trainable_value_model(
                model, engine, self.device, seed=config.run.seed, packing=config.data.packing
            )
        self.engine = Engine(
            self.model,
            engine=engine,
            optimizer=config.critic.optimizer,
            total_steps=total_iterations * config.ppo.num_steps,
            device=self.device,
        )

    @torch.no_grad()
    def values(self, *rollouts: Sequences) -> Values:
        """Return this rank's share of the values before each response token and after the last."""
        self.model.eval()
        sequences = join_sequences(rollouts)
        index, values, bootstrap = [], [], []
        rows, padded = np.arange(len(sequences)), self.model.is_padded
        for forward in local_forward_passes(sequences, rows, self.config, padded=padded):
            batch = forward.batch.to(self.device)
            outputs = self.engine(batch)
            index.append(forward.rows)
            values.append(_predicting_values(outputs, batch))
            bootstrap.append(last_token_values(outputs, batch)[: len(forward.rows)])
        return Values(
            index=np.concatenate(index),
            values=torch.cat(values).cpu().numpy(),
            bootstrap=torch.cat(bootstrap).cpu().numpy(),
        )

    def update(
        self,
        task: UpdateTask,
        rollouts: list[Sequences],
        scores: list[Scores],
        values: list[Values],
        logprobs: list[Logprobs],
        reference: list[Logprobs],
    ) -> dict[str, float]:
        """Run the optimizer steps of an iteration, from the outputs of all workers."""
        experience = make_experience(
            *(rollouts, scores, values, logprobs, reference),
            config=self.config.ppo,
            kl_coef=task.kl_coef,
            score_stats=task.score_stats,
        )
        self.model.train()
        self.engine.steps = task.iteration * self.config.ppo.num_steps
        sums, norms, skipped = np.zeros(2), [], 0
        for rows in optimizer_step_rows(experience, self.config, task.iteration):
            if not len(rows):
                continue
            means = all_reduce(self._accumulate_gradients(experience, rows)).numpy()
            norm = self.engine.step()
            if math.isfinite(norm):
                norms.append(norm)
                sums += means
            else:
                skipped += 1
        loss, clip_frac = sums / max(1, len(norms))
        return {
            "critic/loss": float(loss),
            "critic/clip_frac": float(clip_frac),
            "critic/grad_norm": float(np.mean(norms)) if norms else math.nan,
            "critic/learning_rate": self.engine.learning_rate,
            "critic/steps": float(len(norms) + skipped),
            "critic/skipped_steps": float(skipped),
        }

    def _accumulate_gradients(self, experience: Experience, rows: RowIndices) -> Tensor:
        """Accumulate the gradients of one step; return (2,) shares of loss and clip_frac."""
        sequences, means = experience.sequences, torch.zeros(2, dtype=torch.float64)
        num_tokens = int(sequences.responses.lengths[rows].sum())
        for forward in local_forward_passes(
            sequences, rows, self.config, padded=self.model.is_padded
        ):
            batch = forward.batch.to(self.device)
            outputs = self.engine(batch)
            positions = token_positions(sequences, forward.rows)
            if not len(positions):
                self.engine.backward(outputs.sum() * 0)
                continue
            old_values = _predicting_values(outputs, batch)[None]
            value_loss = ppo_value_loss(
                old_values,
                experience.values[positions].to(self.device)[None],
                experience.returns[positions].to(self.device)[None],
                torch.ones_like(old_values, dtype=torch.bool),
                clip_range=self.config.critic.value_clip_range,
                num_tokens=num_tokens,
            )
            self.engine.backward(value_loss.loss)
            means += torch.stack([x.detach().cpu().double() for x in value_loss])
        return means

    def save(self, url: str) -> list[FileEntry]:
        """Write this rank's part of a checkpoint; return its files."""
        with Folder(url).staging() as directory:
            return file_entries(directory, self.engine.snapshot().write(directory))

    def load(self, url: str) -> None:
        with Folder(url).local() as directory:
            self.engine.load(directory)

    def export(self, url: str) -> list[FileEntry]:
        """Write the critic with its head as a Hugging Face folder; return the files on rank 0."""
        assert self.config.model.name is not None
        with Folder(url).staging() as directory:
            tokenizer = load_tokenizer(self.config.model.name, self.config.model.trust_remote_code)
            export_model(self.model.model, tokenizer, directory)
            if dist.get_rank() > 0:
                return []
            ValueScale(mean=self.model.mean, std=self.model.std).write(directory)
            return file_entries(directory)


def _predicting_values(values: Tensor, batch: PackedBatch) -> Tensor:
    """(n,) those of the values (1, N) at positions that predict a response token."""
    return values[0, batch.labels[0] != IGNORE]

"""The actor role: the policy in training."""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from medgpt.algos.ppo import ppo_policy_loss
from medgpt.artifacts import FileEntry, Folder, entries
from medgpt.config.ppo import PPOStageConfig
from medgpt.data.loader.collate import causal_batch, empty_batch
from medgpt.data.loader.packed_row import Row
from medgpt.engine import Engine, plain_weights
from medgpt.engine.policy import build_policy
from medgpt.models.generate import generation_config
from medgpt.models.lora import plain_parts
from medgpt.models.tokenizer import load_base
from medgpt.rlhf.batching import Rows
from medgpt.rlhf.experience import Experience, Parts, assign_credit
from medgpt.rlhf.roles.common import (
    RATIO_TOLERANCE,
    Task,
    UpdateResult,
    max_tokens,
    my_forwards,
    places_of,
    response_logprobs,
    role_device,
    step_rows,
    summed,
)
from medgpt.rlhf.rollout_batch import Lessons, Logprobs, Sequences, join_sequences
from medgpt.train.export import export_model

METRICS = ("loss", "clip_frac", "approx_kl", "entropy_bonus", "ptx_loss")


class Actor:
    """One rank of the actor. Knows PPO's policy update; knows nothing about Ray."""

    def __init__(self, config: PPOStageConfig, *, total_iterations: int) -> None:
        self.config, self.device = config, role_device()
        engine = config.pools.actor.engine
        self.policy = build_policy(
            config.model,
            engine,
            self.device,
            seed=config.run.seed,
            max_batch_tokens=max_tokens(config),
        )
        self.engine = Engine(
            self.policy,
            engine=engine,
            optimizer=config.optimizer,
            total_steps=total_iterations * config.ppo.num_steps,
            device=self.device,
        )
        self.exact = all(p.dtype == torch.float32 for p in self.policy.parameters())

    def logprobs(self, *rollouts: Sequences) -> Logprobs:
        """This rank's share, under the policy as it is now."""
        return self._logprobs(rollouts, of="actor")

    def reference_logprobs(self, *rollouts: Sequences) -> Logprobs:
        """This rank's share under the base model: the adapters are off."""
        with self.policy.model.disable_adapter():  # pyright: ignore[reportCallIssue] - of LoRA
            return self._logprobs(rollouts, of="reference")

    def _logprobs(
        self, rollouts: Sequence[Sequences], *, of: Literal["actor", "reference"]
    ) -> Logprobs:
        self.policy.eval()
        return response_logprobs(
            self.engine,
            join_sequences(rollouts),
            self.config,
            self.device,
            of=of,
            temperature=self.config.rollout.temperature,
        )

    def update(self, task: Task, *parts: object) -> UpdateResult:
        """The optimizer steps of an iteration. The parts are all pools' answers, and Lessons.

        Raises:
            AssertionError: in fp32, the policy disagrees with itself before it has learnt.
        """
        experience = assign_credit(
            Parts.of(part for part in parts if not isinstance(part, Lessons)),
            self.config.ppo,
            kl_coef=task.kl_coef,
            score_stats=task.score_stats,
        )
        version = experience.sequences.weight_version
        if version != task.weight_version:
            raise RuntimeError(
                f"rollouts of weight version {version} where {task.weight_version} was expected: "
                "the rollout pool has not got the actor's weights"
            )
        lessons = next((part.steps for part in parts if isinstance(part, Lessons)), [])
        metrics = self._learn(experience, lessons, task) if task.actor_learns else {}
        return UpdateResult(
            metrics=experience.metrics | metrics,
            score_stats=experience.score_stats,
            mean_kl=experience.metrics["actor/kl_ref"],
            sample_ids=[experience.sequences.sample_ids[row] for row in experience.rows],
        )

    def _learn(
        self, experience: Experience, lessons: list[list[Row]], task: Task
    ) -> dict[str, float]:
        config = self.config.ppo
        self.policy.train()
        self.engine.steps = task.iteration * config.num_steps  # early stops cost no decay
        sums, norms, skipped = np.zeros(len(METRICS)), [], 0
        first_error = 0.0
        for number, rows in enumerate(step_rows(experience, self.config, task.iteration)):
            if not len(rows):
                continue
            means, error = self._accumulate(experience, rows)
            if lessons:
                means[-1] = self._accumulate_lesson(lessons[number])
            means = summed(means).numpy()
            norm = self.engine.step()
            if not norms and not skipped:
                first_error = self._check_first(error)
            if not math.isfinite(norm):
                skipped += 1
                continue
            norms.append(norm)
            sums += means
            if config.target_kl is not None and means[2] > config.target_kl:
                break
        steps, names = max(1, len(norms)), METRICS if lessons else METRICS[:-1]
        return {
            **{f"actor/{n}": float(x) for n, x in zip(names, sums / steps, strict=False)},
            "actor/grad_norm": float(np.mean(norms)) if norms else math.nan,
            "actor/learning_rate": self.engine.learning_rate,
            "actor/first_ratio_error": first_error,
            "ppo/steps": float(len(norms) + skipped),
            "ppo/skipped_steps": float(skipped),
        }

    def _accumulate(self, experience: Experience, rows: Rows) -> tuple[Tensor, Tensor]:
        """Gradients of one optimizer step; this rank's shares of METRICS, and the largest distance
        of a ratio from 1."""
        config, sequences = self.config, experience.sequences
        num_tokens = int(sequences.responses.lengths[rows].sum())
        means, error = torch.zeros(len(METRICS), dtype=torch.float64), torch.zeros(())
        for forward in my_forwards(sequences, rows, config):
            terms = self.engine(
                forward.batch.to(self.device),
                temperature=config.rollout.temperature,
                with_entropy=config.ppo.entropy_coef > 0,
            )
            places = places_of(sequences, forward.rows)
            if not len(places):
                self.engine.backward(terms.sum() * 0)
                continue
            weights = experience.weights
            old = experience.old_logprobs[places].to(self.device)
            policy = ppo_policy_loss(
                terms[:1],
                old[None],
                experience.advantages[places].to(self.device)[None],
                torch.ones_like(terms[:1], dtype=torch.bool),
                clip_range=config.ppo.clip_range,
                clip_range_high=config.ppo.clip_range_high,
                dual_clip=config.ppo.dual_clip,
                weights=None if weights is None else weights[places].to(self.device)[None],
                num_tokens=num_tokens,
            )
            bonus = terms[1].sum() / num_tokens
            self.engine.backward(policy.loss - config.ppo.entropy_coef * bonus)
            shares = [policy.loss, policy.clip_frac, policy.approx_kl, bonus]
            means[:4] += torch.stack([s.detach().cpu().double() for s in shares])
            error = torch.maximum(error, (terms[0].detach() - old).expm1().abs().max().cpu())
        return means, error

    def _accumulate_lesson(self, rows: list[Row]) -> float:
        """Gradients of the second stream's loss; this rank's share of its mean."""
        assert self.config.ptx is not None
        ptx, rank, num_ranks = self.config.ptx, dist.get_rank(), dist.get_world_size()
        num_targets = sum(causal_batch([row]).num_targets for row in rows)
        size = max(1, self.config.ppo.micro_batch_tokens // ptx.data.max_length)
        mine, share = rows[rank::num_ranks], 0.0
        for start in range(0, -(-len(rows) // num_ranks), size):
            part = mine[start : start + size]
            batch = causal_batch(part) if part else empty_batch(0)
            logprobs = self.engine(batch.to(self.device))[0]
            loss = -logprobs.sum() / max(1, num_targets)
            self.engine.backward(ptx.coef * loss)
            share += float(loss.detach())
        return share

    def _check_first(self, error: Tensor) -> float:
        largest = float(summed(error, dist.ReduceOp.MAX))
        assert not self.exact or not largest > RATIO_TOLERANCE, (
            f"the first step's ratios are up to {largest:.1e} from 1; old log-probabilities and "
            "training forward disagree"
        )
        return largest

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Names and weights as in the plain Hugging Face model, on rank 0. Collective."""
        yield from plain_weights(plain_parts(self.policy.model))

    def save(self, url: str) -> list[FileEntry]:
        """Write this rank's part of a checkpoint."""
        with Folder(url).staging() as directory:
            return entries(directory, self.engine.snapshot().write(directory))

    def load(self, url: str) -> None:
        with Folder(url).local() as directory:
            self.engine.load(directory)

    def export(self, url: str) -> list[FileEntry]:
        """Write the policy as a Hugging Face folder, and the tokenizer; files of rank 0."""
        assert self.config.model.name is not None
        with Folder(url).staging() as directory:
            tokenizer = load_base(self.config.model.name)
            export_model(self.engine, self.policy.model, tokenizer, directory)
            if dist.get_rank() > 0:
                return []
            generation_config(tokenizer).save_pretrained(directory)
            return entries(directory)

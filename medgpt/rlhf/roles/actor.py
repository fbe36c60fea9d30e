"""The actor role: the policy in training."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from medgpt.algos.ppo import ppo_policy_loss
from medgpt.artifacts import FileEntry, Folder, file_entries
from medgpt.config.ppo import PPOStageConfig
from medgpt.data.loader.collate import causal_batch, empty_batch
from medgpt.data.loader.packed_row import PackedRow
from medgpt.engine import Engine
from medgpt.engine.build import build_policy
from medgpt.engine.export import gather_in_file_layout, gather_merged_weights
from medgpt.models.lora import merged_weights
from medgpt.models.tokenizer import load_tokenizer
from medgpt.rlhf.batching import RowIndices
from medgpt.rlhf.experience import Experience, make_experience
from medgpt.rlhf.roles.common import (
    RATIO_TOLERANCE,
    UpdateResult,
    UpdateTask,
    all_reduce,
    local_forward_passes,
    max_pass_tokens,
    optimizer_step_rows,
    response_logprobs,
    role_device,
    token_positions,
)
from medgpt.rlhf.rollout_batch import Logprobs, PtxBatch, Scores, Sequences, Values, join_sequences
from medgpt.rlhf.weight_sync.process_group import SyncState
from medgpt.train.export import export_model

METRICS = ("loss", "clip_frac", "approx_kl", "entropy_bonus", "ptx_loss")


class Actor:
    """One rank of the actor: PPO's policy update, independent of Ray."""

    def __init__(self, config: PPOStageConfig, *, total_iterations: int) -> None:
        self.config, self.device = config, role_device()
        engine = config.pools.actor.engine
        self.policy = build_policy(
            config.model,
            engine,
            self.device,
            seed=config.run.seed,
            max_batch_tokens=max_pass_tokens(config),
            packing=config.data.packing,
        )
        self.engine = Engine(
            self.policy,
            engine=engine,
            optimizer=config.optimizer,
            total_steps=total_iterations * config.ppo.num_steps,
            device=self.device,
        )
        self.sync = SyncState()
        self.is_fp32 = all(p.dtype == torch.float32 for p in self.policy.parameters())

    def logprobs(self, *rollouts: Sequences) -> Logprobs:
        """Return this rank's share of the log-probabilities under the current policy."""
        return self._logprobs(rollouts, with_entropy=True)

    def reference_logprobs(self, *rollouts: Sequences) -> Logprobs:
        """Return this rank's share under the base model, with LoRA adapters disabled."""
        with self.policy.model.disable_adapter():  # pyright: ignore[reportCallIssue] - of LoRA
            return self._logprobs(rollouts)

    def _logprobs(self, rollouts: Sequence[Sequences], *, with_entropy: bool = False) -> Logprobs:
        self.policy.eval()
        return response_logprobs(
            self.engine,
            join_sequences(rollouts),
            self.config,
            self.device,
            temperature=self.config.rollout.temperature,
            padded=self.policy.is_padded,
            with_entropy=with_entropy,
        )

    def update(
        self,
        task: UpdateTask,
        rollouts: list[Sequences],
        scores: list[Scores],
        values: list[Values],
        logprobs: list[Logprobs],
        reference: list[Logprobs],
        ptx: PtxBatch | None = None,
    ) -> UpdateResult:
        """Run the optimizer steps of an iteration, from the outputs of all workers.

        Raises:
            AssertionError: in fp32, the ratios before the first step are not 1.
        """
        experience = make_experience(
            *(rollouts, scores, values, logprobs, reference),
            config=self.config.ppo,
            kl_coef=task.kl_coef,
            score_stats=task.score_stats,
        )
        version = experience.sequences.weight_version
        if version != task.weight_version:
            raise RuntimeError(
                f"rollouts have weight version {version}, but {task.weight_version} was expected: "
                "the rollout pool does not hold the actor's weights"
            )
        metrics = {}
        if task.update_actor:
            metrics = self._run_optimizer_steps(experience, ptx.steps if ptx else [], task)
        return UpdateResult(
            metrics=experience.metrics | metrics,
            score_stats=experience.score_stats,
            mean_kl=experience.metrics["actor/kl_ref"],
            sample_ids=[experience.sequences.sample_ids[row] for row in experience.valid_rows],
        )

    def _run_optimizer_steps(
        self, experience: Experience, ptx_steps: list[list[PackedRow]], task: UpdateTask
    ) -> dict[str, float]:
        config = self.config.ppo
        self.policy.train()
        self.engine.steps = task.iteration * config.num_steps  # also after early stops
        sums, norms, skipped = np.zeros(len(METRICS)), [], 0
        first_error = 0.0
        for number, rows in enumerate(optimizer_step_rows(experience, self.config, task.iteration)):
            if not len(rows):
                continue
            means, ratio_error = self._accumulate_gradients(experience, rows)
            if ptx_steps:
                means[-1] = self._accumulate_ptx_gradients(ptx_steps[number])
            means = all_reduce(means).numpy()
            norm = self.engine.step()
            if not norms and not skipped:
                first_error = self._check_first_ratios(ratio_error)
            if not math.isfinite(norm):
                skipped += 1
                continue
            norms.append(norm)
            sums += means
            if config.target_kl is not None and means[2] > config.target_kl:
                break
        steps, names = max(1, len(norms)), METRICS if ptx_steps else METRICS[:-1]
        return {
            **{f"actor/{n}": float(x) for n, x in zip(names, sums / steps, strict=False)},
            "actor/grad_norm": float(np.mean(norms)) if norms else math.nan,
            "actor/learning_rate": self.engine.learning_rate,
            "actor/first_ratio_error": first_error,
            "ppo/steps": float(len(norms) + skipped),
            "ppo/skipped_steps": float(skipped),
        }

    def _accumulate_gradients(
        self, experience: Experience, rows: RowIndices
    ) -> tuple[Tensor, Tensor]:
        """Accumulate the gradients of one optimizer step. Return this rank's shares of METRICS and
        the largest deviation of a ratio from 1."""
        config, sequences = self.config, experience.sequences
        num_tokens = int(sequences.responses.lengths[rows].sum())
        means, ratio_error = torch.zeros(len(METRICS), dtype=torch.float64), torch.zeros(())
        for forward in local_forward_passes(sequences, rows, config, padded=self.policy.is_padded):
            terms = self.engine(
                forward.batch.to(self.device),
                temperature=config.rollout.temperature,
                with_entropy=config.ppo.entropy_coef > 0,
            )
            positions = token_positions(sequences, forward.rows)
            if not len(positions):
                self.engine.backward(terms.sum() * 0)
                continue
            weights = experience.importance_weights
            old = experience.old_logprobs[positions].to(self.device)
            policy_loss = ppo_policy_loss(
                terms[:1],
                old[None],
                experience.advantages[positions].to(self.device)[None],
                torch.ones_like(terms[:1], dtype=torch.bool),
                clip_range=config.ppo.clip_range,
                clip_range_high=config.ppo.clip_range_high,
                dual_clip=config.ppo.dual_clip,
                weights=None if weights is None else weights[positions].to(self.device)[None],
                num_tokens=num_tokens,
            )
            entropy_bonus = terms[1].sum() / num_tokens
            self.engine.backward(policy_loss.loss - config.ppo.entropy_coef * entropy_bonus)
            shares = [policy_loss.loss, policy_loss.clip_frac, policy_loss.approx_kl, entropy_bonus]
            means[:4] += torch.stack([s.detach().cpu().double() for s in shares])
            ratio_error = torch.maximum(
                ratio_error, (terms[0].detach() - old).expm1().abs().max().cpu()
            )
        return means, ratio_error

    def _accumulate_ptx_gradients(self, rows: list[PackedRow]) -> float:
        """Accumulate the gradients of the PPO-ptx loss; return this rank's share of its mean."""
        assert self.config.ptx is not None
        ptx, rank, num_ranks = self.config.ptx, dist.get_rank(), dist.get_world_size()
        num_targets = sum(causal_batch([row]).num_targets for row in rows)
        size = max(1, self.config.ppo.micro_batch_tokens // ptx.data.max_length)
        local_rows, share = rows[rank::num_ranks], 0.0
        for start in range(0, -(-len(rows) // num_ranks), size):
            micro_batch = local_rows[start : start + size]
            batch = causal_batch(micro_batch) if micro_batch else empty_batch(0)
            logprobs = self.engine(batch.to(self.device))[0]
            loss = -logprobs.sum() / max(1, num_targets)
            self.engine.backward(ptx.coef * loss)
            share += float(loss.detach())
        return share

    def _check_first_ratios(self, error: Tensor) -> float:
        largest = float(all_reduce(error, dist.ReduceOp.MAX))
        assert not self.is_fp32 or not largest > RATIO_TOLERANCE, (
            f"the first step's ratios are up to {largest:.1e} from 1: the training forward does "
            "not reproduce the old log-probabilities"
        )
        return largest

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and weights on rank 0, with LoRA merged. Collective.

        They are those of the hub's files for vLLM, which has modules of its own, and those of
        transformers' modules for medgpt's engine.
        """
        weights = merged_weights(self.policy.model)
        if self.config.rollout.engine == "vllm":
            yield from gather_in_file_layout(self.policy.pretrained, weights)
        else:
            yield from gather_merged_weights(weights)

    def save(self, url: str) -> list[FileEntry]:
        """Write this rank's part of a checkpoint; return its files."""
        with Folder(url).staging() as directory:
            return file_entries(directory, self.engine.snapshot().write(directory))

    def load(self, url: str) -> None:
        with Folder(url).local() as directory:
            self.engine.load(directory)

    def export(self, url: str) -> list[FileEntry]:
        """Write policy and tokenizer as a Hugging Face folder; return the files on rank 0."""
        assert self.config.model.name is not None
        with Folder(url).staging() as directory:
            tokenizer = load_tokenizer(self.config.model.name, self.config.model.trust_remote_code)
            export_model(self.policy.model, tokenizer, directory)
            if dist.get_rank() > 0:
                return []
            return file_entries(directory)

"""Evaluate trained policies on the questions that are reserved for the final check."""

from typing import Any

from medgpt.config.loading import with_values
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.tune import SHARED_ROLES, TuneStageConfig
from medgpt.rlhf.heldout_eval import HeldoutEval
from medgpt.rlhf.pools.pool import Pool
from medgpt.rlhf.roles.reference import Reference
from medgpt.rlhf.roles.rollout import Rollout
from medgpt.rlhf.rollout_batch import Prompts, join_per_token, join_sequences
from medgpt.rlhf.setup import build_role_pools
from medgpt.tune.objective import JUDGE_METRICS
from medgpt.tune.results import TrainedPolicy
from medgpt.tune.trial import TrialSetup
from medgpt.tune.trial_pools import TrialPools, reuse_or_start

ResultRow = dict[str, Any]


class FinalEvaluation(HeldoutEval):
    """Evaluates sampled answers, in addition to the greedy ones of the judge."""

    def sampled_metrics(self, seed: int) -> tuple[dict[str, float], float | None]:
        """Sample answers with the seed; return their judge metrics and their mean KL from the
        reference in nats per answer, None without a reference pool."""
        (ids,) = self.pools.get([self.prompts], "prompts")
        prompts = Prompts(
            sample_ids=[question.id for question in self.question_set.questions],
            ids=ids,
            messages=["[]"] * len(ids),
        )
        answers = self.rollout.call(Rollout.generate, prompts, seed)
        metrics = self.score_answers(answers)
        if "reference" not in self.pools.pools:
            return metrics, None
        pool: Pool[Reference] = self.pools.pools["reference"]
        refs = pool.call(Reference.logprobs, self.config.rollout.temperature, *answers)
        reference = self.pools.get(refs, "reference")
        sequences = join_sequences(self.pools.get(answers, "answers"))
        logprob_gap = sequences.logprobs - join_per_token(reference, sequences.responses)
        return metrics, float(logprob_gap.sum()) / len(sequences)


def evaluate_policies(
    config: TuneStageConfig, setup: TrialSetup, policies: list[TrainedPolicy]
) -> list[ResultRow]:
    """Return a row for each policy and seed: policy, seed, mark, mark_se, kl."""
    rows: list[ResultRow] = []
    pools: TrialPools | None = None
    trial_pools = build_role_pools(setup.ppo_config, 1)
    shared_pools = [pool for pool in trial_pools if pool.role in SHARED_ROLES]
    try:
        for policy in policies:
            ppo_config = _final_eval_config(config, policy.url)
            policy_pools = build_role_pools(ppo_config, 1)
            role_pools = [pool for pool in policy_pools if pool.role == "rollout"] + shared_pools
            pools = reuse_or_start(pools, role_pools, ppo_config, setup.shared_pools, say=print)
            rows += _policy_rows(policy, FinalEvaluation(ppo_config, pools), config)
    finally:
        if pools is not None:
            pools.close()
    return rows


def _policy_rows(
    policy: TrainedPolicy, evaluation: FinalEvaluation, config: TuneStageConfig
) -> list[ResultRow]:
    name = JUDGE_METRICS[config.tune.metric]

    def row(seed: int, metrics: dict[str, float], kl: float | None) -> ResultRow:
        value = {"mark": metrics[name], "mark_se": metrics[f"{name}_se"]}
        return {"policy": policy.name, "seed": seed, **value, "kl": kl}

    if policy.seed is not None:
        _, kl = evaluation.sampled_metrics(policy.seed)
        return [row(policy.seed, evaluation.metrics(), kl)]
    seeds = range(1, config.check.seeds + 1)
    return [row(seed, *evaluation.sampled_metrics(seed)) for seed in seeds]


def _final_eval_config(config: TuneStageConfig, url: str) -> PPOStageConfig:
    """Return the base config with the policy's model and the questions reserved for the check."""
    ppo_config = config.base_config
    low, high = ppo_config.judge.hash_range
    values = {
        "model.name": url,
        "judge.hash_range": [high - config.check.share * (high - low), high],
        "rollout.max_new_tokens": ppo_config.judge.max_new_tokens,
    }
    return with_values(PPOStageConfig, ppo_config, values)

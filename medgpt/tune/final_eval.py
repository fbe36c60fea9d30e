"""Policies that were trained, asked the questions of the check."""

from typing import Any

from medgpt.config.loading import with_values
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.tune import FROZEN, TuneStageConfig
from medgpt.rlhf.heldout_eval import Judging
from medgpt.rlhf.pools.pool import Pool
from medgpt.rlhf.roles.reference import Reference
from medgpt.rlhf.roles.rollout import Rollout
from medgpt.rlhf.rollout_batch import Prompts, join_sequences, join_tokens
from medgpt.rlhf.setup import role_pools
from medgpt.tune.objective import MARKS
from medgpt.tune.results import Policy
from medgpt.tune.trial import Setup
from medgpt.tune.trial_pools import TrialPools

Row = dict[str, Any]


class Exam(Judging):
    """Answers that are sampled, where the judge has greedy ones."""

    def sampled(self, seed: int) -> tuple[dict[str, float], float | None]:
        """Marks of answers that are drawn with the seed; nats of an answer from the reference."""
        (ids,) = self.pools.get([self.prompts], "prompts")
        prompts = Prompts(
            sample_ids=[asked.id for asked in self.judge.asked],
            ids=ids,
            messages=["[]"] * len(ids),
        )
        answers = self.rollout.call(Rollout.generate, prompts, seed)
        marks = self.marks(answers)
        if "reference" not in self.pools.pools:
            return marks, None
        pool: Pool[Reference] = self.pools.pools["reference"]
        refs = pool.call(Reference.logprobs, self.config.rollout.temperature, *answers)
        reference = self.pools.get(refs, "reference")
        whole = join_sequences(self.pools.get(answers, "answers"))
        gap = whole.logprobs - join_tokens(reference, whole.responses)
        return marks, float(gap.sum()) / len(whole)


def examine(config: TuneStageConfig, setup: Setup, policies: list[Policy]) -> list[Row]:
    """For each policy and seed: policy, seed, mark, mark_se, kl."""
    rows: list[Row] = []
    pools: TrialPools | None = None
    try:
        for policy in policies:
            stage = _for_exam(config, policy.url)
            found = [pool for pool in role_pools(stage, 1) if pool.role == "rollout"]
            found += [pool for pool in role_pools(setup.stage, 1) if pool.role in FROZEN]
            if pools is None:
                pools = TrialPools(
                    found, stage, front=setup.front, num_workers=setup.num_workers, say=print
                )
                pools.start()
            else:
                pools.renew(found)
            rows += _rows(policy, Exam(stage, pools), config)
    finally:
        if pools is not None:
            pools.close()
    return rows


def _rows(policy: Policy, exam: Exam, config: TuneStageConfig) -> list[Row]:
    name = MARKS[config.tune.mark]

    def row(seed: int, marks: dict[str, float], kl: float | None) -> Row:
        mark = {"mark": marks[name], "mark_se": marks[f"{name}_se"]}
        return {"policy": policy.who, "seed": seed, **mark, "kl": kl}

    if policy.seed is not None:
        _, kl = exam.sampled(policy.seed)
        return [row(policy.seed, exam.metrics(), kl)]
    return [row(seed, *exam.sampled(seed)) for seed in range(1, config.check.seeds + 1)]


def _for_exam(config: TuneStageConfig, url: str) -> PPOStageConfig:
    """The base with a policy's model, and the judge's questions that trials are not judged by."""
    stage = config.stage
    low, high = stage.judge.part
    values = {
        "model.name": url,
        "judge.part": [high - config.check.share * (high - low), high],
        "rollout.max_new_tokens": stage.judge.max_new_tokens,
    }
    return with_values(PPOStageConfig, stage, values)

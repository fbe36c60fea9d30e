"""PPO sections for the reward, the judge and the detection of diverged runs."""

from collections import Counter
from typing import Annotated, Literal, Self, get_args

from annotated_types import Ge, Gt, Le
from pydantic import Field, StringConstraints, model_validator

from medgpt.config.base import Config, Count, DataPath, ModelPath, Name

RuleName = Literal["urgency", "dose", "diagnosis", "hotline", "language", "repetition"]
RULES: tuple[RuleName, ...] = get_args(RuleName)
SCORE_COMPONENT = "score"  # name of the component of the reward model
Weight = Annotated[float, Ge(0)]


class RewardFunctionConfig(Config):
    """A reward function of your own. It receives a list of
    `medgpt.rlhf.rewards.reward_sample.RewardSample` and returns a number for each, or None to leave
    a sample out."""

    name: Name
    """Name of the component in metrics."""
    path: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    """`module:function`; the module must be importable on every node."""
    weight: float = 1.0
    """Weight in the total reward."""


class PPORewardConfig(Config):
    """The reward is the weighted sum of its components."""

    model: ModelPath | None = None
    """Reward model: a run of `medgpt reward`, or its model folder."""
    score_weight: Weight = 1.0
    """Weight of the reward model's normalized score; 0 uses no reward model."""
    rules: dict[RuleName, Weight] = Field(default={})
    """Weights of the medical rules; 1 unless set, and 0 disables a rule. A rule gives 0 to an
    answer that follows it and -1 to one that violates it."""
    violation_cap: float = -1.0
    """Maximum total reward of an answer that violates a rule."""
    functions: tuple[RewardFunctionConfig, ...] = ()

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = Counter([SCORE_COMPONENT, *RULES, *(function.name for function in self.functions)])
        duplicates = [name for name, times in names.items() if times > 1]
        if duplicates:
            raise ValueError(f"two components are called {duplicates[0]}; rename the function")
        return self

    @model_validator(mode="after")
    def _check_has_component(self) -> Self:
        if not (self.score_weight or self.functions or any(self.rule_weights().values())):
            raise ValueError("no component is enabled; set score_weight, a rule or a function")
        return self

    def rule_weights(self) -> dict[RuleName, float]:
        """Return the weights of the enabled rules."""
        weights: dict[RuleName, float] = {name: self.rules.get(name, 1.0) for name in RULES}
        return {name: weight for name, weight in weights.items() if weight}


class JudgeConfig(Config):
    """A judge that training does not see: held-out questions, checks and its own reward model."""

    every: Annotated[int, Ge(0)] = 0
    """Iterations between judge evaluations; 0 disables the judge."""
    model: ModelPath | None = None
    """Reward model trained on another split than the one that training uses; unset: checks only."""
    key_points: DataPath | None = None
    """JSON lines with prompt, key_points, kind and condition: held_out.jsonl of a sample corpus."""
    kinds: tuple[str, ...] = ()
    """Use only questions of these kinds; empty: all."""
    triage: Annotated[int, Ge(0)] = 40
    """Maximum number of notes with and without a red flag, in whole pairs."""
    languages: tuple[Literal["zh", "en"], ...] = ("zh", "en")
    """Languages of the notes."""
    max_new_tokens: Count = 192
    """Maximum tokens of an answer."""
    hash_range: tuple[Annotated[float, Ge(0), Le(1)], Annotated[float, Ge(0), Le(1)]] = (0.0, 1.0)
    """Use only questions whose hash lies in this range: [0.0, 0.5] and [0.5, 1.0] are two judges
    without a common question."""

    @model_validator(mode="after")
    def _check_has_questions(self) -> Self:
        if self.every and not (self.key_points or self.triage):
            raise ValueError("has no questions; set key_points or triage, or every=0")
        if self.triage == 1:
            raise ValueError("triage=1 holds no pair of notes; use 2 or more, or 0")
        return self


class DiagnosisConfig(Config):
    """When a run counts as diverged and stops with the reason. A limit of 0 is not checked."""

    window: Annotated[int, Ge(2)] = 5
    """Number of iterations in a mean."""
    max_kl: Annotated[float, Ge(0)] = 60.0
    """Maximum KL from the reference in nats per answer, mean of the window."""
    max_logprob_gap: Annotated[float, Ge(0)] = 1.0
    """Maximum rollout/logprob_gap of an iteration in nats per token. Beyond it, rollout engine and
    training compute different models."""
    min_entropy_share: Annotated[float, Ge(0), Le(1)] = 0.1
    """Minimum entropy, as a share of the first window's."""
    max_length_factor: Annotated[float, Ge(0)] = 3.0
    """Maximum length of the answers, relative to the first window's."""
    max_skipped_share: Annotated[float, Ge(0), Le(1)] = 0.5
    """Maximum share of steps, or of samples, of the window skipped because they were not finite."""
    max_masked_share: Annotated[float, Ge(0), Le(1)] = 0.5
    """Maximum share of samples of the window without a reward because a component failed."""
    judge_drop: Annotated[float, Ge(0)] = 2.0
    """Stop if the judge metric is this many of its standard errors below its best while the
    training score has risen by as many of its own."""
    judge_patience: Annotated[int, Gt(0)] = 2
    """Number of consecutive judge evaluations that must be that low."""

"""What PPO rewards, how it is judged from outside, and when a run is stopped."""

from collections import Counter
from typing import Annotated, Literal, Self

from annotated_types import Ge, Gt, Le
from pydantic import Field, StringConstraints, model_validator

from medgpt.config.base import Config, Count, DataPath, ModelPath, Name

RuleName = Literal["urgency", "dose", "diagnosis", "hotline", "language", "repetition"]
RULES: tuple[RuleName, ...] = (
    "urgency",
    "dose",
    "diagnosis",
    "hotline",
    "language",
    "repetition",
)
SCORE_COMPONENT = "score"  # the reward model's component
Weight = Annotated[float, Ge(0)]


class RewardFunctionConfig(Config):
    """A reward function of your own. It gets a list of
    `medgpt.rlhf.rewards.reward_sample.Answered` and returns as many numbers, None where it cannot
    tell (the sample is then left out)."""

    name: Name
    """How metrics call it."""
    path: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    """`module:function`; the module is importable on every node."""
    weight: float = 1.0
    """Its share of the total."""


class PPORewardConfig(Config):
    """A reward is the weighted sum of its components."""

    model: ModelPath | None = None
    """The reward model: a run of `medgpt reward`, or its model folder."""
    score_weight: Weight = 1.0
    """Of the reward model's normalised score; 0 does without one."""
    rules: dict[RuleName, Weight] = Field(default={})
    """Weights of the medical rules, 1 unless named; 0 leaves a rule out. Each is 0 for an answer
    that keeps it and -1 for one that violates it."""
    violation_cap: float = -1.0
    """Most that an answer gets in all which violates a rule, whatever else it has."""
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
            raise ValueError("there is no component; set score_weight, a rule or a function")
        return self

    def rule_weights(self) -> dict[RuleName, float]:
        """Of the rules that take part."""
        weights: dict[RuleName, float] = {name: self.rules.get(name, 1.0) for name in RULES}
        return {name: weight for name, weight in weights.items() if weight}


class JudgeConfig(Config):
    """A judge that training does not see: held-out questions, checks, and a reward model of its
    own."""

    every: Annotated[int, Ge(0)] = 0
    """Iterations between judgements; 0 never judges."""
    model: ModelPath | None = None
    """A reward model trained on another split than the one that training uses; unset: checks
    only."""
    key_points: DataPath | None = None
    """JSON lines with prompt, key_points, kind and condition: held_out.jsonl of a sample corpus."""
    kinds: tuple[str, ...] = ()
    """Only questions of these kinds; empty: all."""
    triage: Annotated[int, Ge(0)] = 40
    """At most this many notes with and without a red flag, in whole pairs."""
    languages: tuple[Literal["zh", "en"], ...] = ("zh", "en")
    """Of the notes."""
    max_new_tokens: Count = 192
    """Longest answer."""
    part: tuple[Annotated[float, Ge(0), Le(1)], Annotated[float, Ge(0), Le(1)]] = (0.0, 1.0)
    """Of all questions only those whose hash lies between the two: [0.0, 0.5] and [0.5, 1.0] are
    two judges without a common question."""

    @model_validator(mode="after")
    def _check_has_questions(self) -> Self:
        if self.every and not (self.key_points or self.triage):
            raise ValueError("has no questions; set key_points or triage, or every=0")
        if self.triage == 1:
            raise ValueError("triage=1 holds no pair of notes; use 2 or more, or 0")
        return self


class DiagnosisConfig(Config):
    """When a run counts as diverged and halts with the reason. A limit of 0 is not checked."""

    window: Annotated[int, Ge(2)] = 5
    """Iterations that a mean is taken over."""
    max_kl: Annotated[float, Ge(0)] = 60.0
    """Nats per answer between policy and reference, mean of the window."""
    min_entropy_share: Annotated[float, Ge(0), Le(1)] = 0.1
    """Of the first window's entropy."""
    max_length_factor: Annotated[float, Ge(0)] = 3.0
    """Length of the answers, relative to the first window."""
    max_skipped_share: Annotated[float, Ge(0), Le(1)] = 0.5
    """Optimizer steps of the window, or samples, left out because they were not finite."""
    max_masked_share: Annotated[float, Ge(0), Le(1)] = 0.5
    """Samples of the window without a reward because a component failed."""
    judge_drop: Annotated[float, Ge(0)] = 2.0
    """Halt when the judge's mark has fallen this many of its standard errors below its best while
    the training score rose by as many of its own."""
    judge_patience: Annotated[int, Gt(0)] = 2
    """Judgements in a row that must be that low."""

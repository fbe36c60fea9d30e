"""What a reward model learns from."""

from typing import Annotated, ClassVar, Literal, Self

from annotated_types import Ge
from pydantic import model_validator

from medgpt.config.base import Config, Count
from medgpt.config.stages import SampleKind, TrainStageConfig


class RewardObjectiveConfig(Config):
    margin_coef: Annotated[float, Ge(0)] = 0.0
    """The better answer's score must lead by this times the difference of the grades; a pair has a
    difference of 1, or its margin."""
    normalise_on: Literal["chosen", "own"] = "chosen"
    """In the end scores have mean 0 and deviation 1 on: chosen, the best answers of the data; own,
    what the model it starts from answers to the prompts."""
    normalise_prompts: Count = 256
    """So many prompts of the training data."""
    max_new_tokens: Count = 128
    """Longest of the own answers."""


class PreferenceStageConfig(TrainStageConfig):
    """What stages have that learn from preferences."""

    sample_kind: ClassVar[SampleKind] = "preferences"

    @model_validator(mode="after")
    def _check_base_model(self) -> Self:
        if self.model.name is None:
            raise ValueError(
                "model.architecture: start from a model that medgpt sft wrote, as name"
            )
        if self.tokenizer.mode != "base":
            raise ValueError(
                f"tokenizer.mode={self.tokenizer.mode}: must be base, the actor's and the reward "
                "model's token ids are the same"
            )
        if self.train.neftune_alpha:
            raise ValueError(f"train.neftune_alpha={self.train.neftune_alpha:g}: must be 0 here")
        return self


class RewardModelConfig(PreferenceStageConfig):
    """configs/reward.toml"""

    objective: RewardObjectiveConfig = RewardObjectiveConfig()

    @model_validator(mode="after")
    def _check_no_report_prompts(self) -> Self:
        if self.report.prompts:
            raise ValueError("report.prompts: a reward model writes no answers; leave them out")
        return self

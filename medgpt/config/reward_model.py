"""Configuration of `medgpt reward`, and the base of all stages that learn from preferences."""

from typing import Annotated, ClassVar, Literal, Self

from annotated_types import Ge
from pydantic import model_validator

from medgpt.config.base import Config, Count
from medgpt.config.stages import SampleKind, TrainStageConfig


class RewardObjectiveConfig(Config):
    margin_coef: Annotated[float, Ge(0)] = 0.0
    """Minimum margin of the better answer's score, per unit of the difference of the grades; a pair
    has a difference of 1, or its margin."""
    normalize_on: Literal["chosen", "own"] = "chosen"
    """After training, scores are normalized to mean 0 and standard deviation 1 on: chosen, the best
    answers of the data; own, answers that the initial model generates for the prompts."""
    normalize_prompts: Count = 256
    """Number of training prompts to normalize the scores on."""
    max_new_tokens: Count = 128
    """Maximum tokens of a generated answer."""


class PreferenceStageConfig(TrainStageConfig):
    """Base of the stages that learn from preferences."""

    sample_kind: ClassVar[SampleKind] = "preferences"

    @model_validator(mode="after")
    def _check_base_model(self) -> Self:
        if self.model.name is None:
            raise ValueError(
                "model.architecture: not available here; set model.name to a model that medgpt sft "
                "wrote"
            )
        if self.tokenizer.mode != "base":
            raise ValueError(
                f"tokenizer.mode={self.tokenizer.mode}: must be base, because the actor and "
                "the reward model exchange token ids"
            )
        if self.train.neftune_alpha:
            raise ValueError(f"train.neftune_alpha={self.train.neftune_alpha:g}: must be 0 here")
        return self


class RewardModelConfig(PreferenceStageConfig):
    """Root config of the reward model stage, as in configs/reward.toml."""

    objective: RewardObjectiveConfig = RewardObjectiveConfig()

    @model_validator(mode="after")
    def _check_no_report_prompts(self) -> Self:
        if self.report.prompts:
            raise ValueError("report.prompts: a reward model generates no answers; leave them out")
        if self.model.lora.quantize or self.model.rope_scaling:
            key = "lora.quantize" if self.model.lora.quantize else "rope_scaling"
            raise ValueError(
                f"model.{key}: not for reward models; leave it out, or merge the result of a "
                "fine-tuning that had it and name the merged model"
            )
        return self

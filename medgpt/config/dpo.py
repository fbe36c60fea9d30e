"""Configuration of `medgpt dpo`: training on preferences without rollouts."""

from typing import Annotated, Literal, Self, get_args

from annotated_types import Ge, Gt, Len, Lt
from pydantic import model_validator

from medgpt.config.base import Config
from medgpt.config.reward_model import PreferenceStageConfig

PairLoss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
UnpairedLoss = Literal["kto", "apo_zero_unpaired"]
UNPAIRED_LOSSES: tuple[UnpairedLoss, ...] = get_args(UnpairedLoss)
SMOOTHED_LOSSES = ("sigmoid", "exo_pair", "robust", "sigmoid_norm")


class DPOLossConfig(Config):
    loss: Annotated[tuple[PairLoss | UnpairedLoss, ...], Len(1)] = ("sigmoid",)
    """TRL's loss types; losses over pairs are summed. `kto` and `apo_zero_unpaired` learn from
    single answers and cannot be combined."""
    loss_weights: tuple[float, ...] | None = None
    """Weight of each loss; unset: 1 each."""
    beta: Annotated[float, Gt(0)] = 0.1
    """Strength of the pull towards the initial model."""
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0
    """Assumed share of pairs in the wrong order; exo_pair needs a value above 0, such as 1e-3."""
    desirable_weight: Annotated[float, Ge(0)] = 1.0
    """kto: weight of the better answers."""
    undesirable_weight: Annotated[float, Ge(0)] = 1.0
    """kto: weight of the worse answers."""

    @property
    def unpaired(self) -> bool:
        """Whether the loss learns from single answers."""
        return self.loss[0] in UNPAIRED_LOSSES

    @model_validator(mode="after")
    def _check_losses(self) -> Self:
        if len(self.loss) > 1 and any(loss in UNPAIRED_LOSSES for loss in self.loss):
            raise ValueError(f"loss={list(self.loss)}: {' and '.join(UNPAIRED_LOSSES)} stand alone")
        if len(set(self.loss)) < len(self.loss):
            raise ValueError(f"loss={list(self.loss)}: name each loss once")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss):
            raise ValueError(
                f"loss_weights has {len(self.loss_weights)} numbers for {len(self.loss)} losses"
            )
        if self.loss_weights is not None and self.unpaired:
            raise ValueError(f"loss_weights: not with loss={list(self.loss)}; leave it out")
        if "exo_pair" in self.loss and not self.label_smoothing:
            raise ValueError("label_smoothing=0: exo_pair needs a value above 0, such as 1e-3")
        if self.label_smoothing and not any(loss in SMOOTHED_LOSSES for loss in self.loss):
            raise ValueError(
                f"label_smoothing={self.label_smoothing:g}: only {', '.join(SMOOTHED_LOSSES)} "
                "use it"
            )
        return self


class DPOConfig(PreferenceStageConfig):
    """Root config of the DPO stage, as in configs/dpo.toml."""

    dpo: DPOLossConfig = DPOLossConfig()

    @model_validator(mode="after")
    def _check_trainer_limits(self) -> Self:
        if "://" in self.run.dir and not self.run.dir.startswith("file://"):
            raise ValueError(
                f"run.dir={self.run.dir}: TRL's trainer cannot write checkpoints to a URI; "
                "set a folder that all workers share"
            )
        if not isinstance(self.cluster.num_workers, int):
            raise ValueError(
                f"cluster.num_workers={self.cluster.workers_text}: TRL's trainer resumes with as "
                "many workers as before; set one number"
            )
        if self.dpo.unpaired and self.train.micro_batch_size < 2:
            raise ValueError(
                f"train.micro_batch_size={self.train.micro_batch_size}: {self.dpo.loss[0]} "
                "compares the answers of a micro-batch; set 2 or more"
            )
        if self.train.audit:
            raise ValueError("train.audit=true: TRL decides the order of the samples; leave it out")
        return self

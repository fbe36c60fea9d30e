"""Models with a value head: critics, which predict a value at every position, and reward models,
whose score is the value at the last token of an answer."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.peft_utils import ADAPTER_SAFE_WEIGHTS_NAME

from medgpt.config.base import ModelError
from medgpt.config.data import Packing
from medgpt.config.model import ModelConfig
from medgpt.data.loader.batch import PackedBatch
from medgpt.models.load import build_model
from medgpt.models.model_files import (
    VALUE_HEAD,
    VALUE_HEAD_WEIGHT,
    adapter_base,
    has_adapters,
    lacks_value_head,
    read_hf_config,
    resolve_model_folder,
    weight_files,
)
from medgpt.models.packed import PackedModel

if TYPE_CHECKING:
    from peft import PeftModel

SCORE_FILE, SCALE_FILE = "score.json", "value.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModelInfo:
    """Contents of score.json, saved beside the weights of a reward model."""

    mean: float  # of the raw scores of the texts in `normalised_on`
    std: float
    normalised_on: str
    speech: dict[str, str]  # tokenizer_compat.tokenizer_fingerprint of its tokenizer

    @staticmethod
    def read(folder: Path) -> "RewardModelInfo | None":
        """Read score.json; return None if the folder holds no reward model."""
        file = folder / SCORE_FILE
        return RewardModelInfo(**json.loads(file.read_text("utf-8"))) if file.is_file() else None

    def write(self, folder: Path) -> None:
        (folder / SCORE_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueScale:
    """Mean and standard deviation that values are relative to; value.json beside a critic."""

    mean: float = 0.0
    std: float = 1.0

    @staticmethod
    def load(name: str) -> "ValueScale":
        """Read the scale of a critic or reward model; any other model has the default scale."""
        folder = resolve_model_folder(name, adapters_allowed=True)
        if (folder / SCALE_FILE).is_file():
            return ValueScale(**json.loads((folder / SCALE_FILE).read_text("utf-8")))
        score = RewardModelInfo.read(folder)
        return ValueScale() if score is None else ValueScale(mean=score.mean, std=score.std)

    def write(self, folder: Path) -> None:
        (folder / SCALE_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")


class ValueModel(PackedModel):
    """A decoder with a head of one output in place of its output layer.

    Args:
        model: a model with head kind "value" (models.load), or the same with LoRA.
        mean, std: of the head's outputs; `forward` subtracts the mean and divides by std.
        activation_checkpointing: recompute activations in the backward pass.
    """

    def __init__(
        self,
        model: "PreTrainedModel | PeftModel",
        *,
        mean: float = 0.0,
        std: float = 1.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(model, activation_checkpointing=activation_checkpointing)
        self.mean, self.std = mean, std

    def forward(self, batch: PackedBatch, *, noise_seeds: Sequence[int] | None = None) -> Tensor:
        """Return the value (1, N) float32 at every position, given its sequence up to there.

        Args:
            noise_seeds: S seeds, one per sequence, for LoRA's dropout.
        """
        hidden = self.hidden_states(batch, noise_seeds)
        values = self.pretrained.get_submodule(VALUE_HEAD)(hidden)[:, 0]
        return ((values - self.mean) / self.std)[None]


def last_token_values(values: Tensor, batch: PackedBatch) -> Tensor:
    """Return the values (S,) at the last token of each sequence: the scores of a reward model."""
    return values[0, batch.cu_seqlens[1:].long() - 1]


class ValueHead(nn.Linear):
    """Linear layer from H to 1 without bias, computed in float32 whatever the weights' dtype."""

    def __init__(self, hidden_size: int, *, dtype: torch.dtype, seed: int) -> None:
        """Draw normal weights of variance 1 / (H + 1), Stiennon et al., 2020 (2009.01325), B.1."""
        super().__init__(hidden_size, 1, bias=False, dtype=dtype)
        draws = torch.empty(1, hidden_size)
        draws.normal_(std=(hidden_size + 1) ** -0.5, generator=torch.Generator().manual_seed(seed))
        self.weight.data.copy_(draws)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.weight.float())


def install_value_head(model: PreTrainedModel, config: ModelConfig, *, seed: int) -> None:
    """Replace transformers' head by a ValueHead: the saved one if there is one, else a fresh one.

    Raises ConfigError if the model's head is of another kind, or missing in its files.
    """
    transformers_head = dict(model.named_children()).get(VALUE_HEAD)
    if not isinstance(transformers_head, nn.Linear) or transformers_head.bias is not None:
        raise ModelError(
            config.name,
            f"{type(model).__name__} has no linear layer `{VALUE_HEAD}` "
            "without bias as its head; use a model like Qwen, Llama or Mistral",
        )
    head = ValueHead(transformers_head.in_features, dtype=transformers_head.weight.dtype, seed=seed)
    if has_value_head(config):
        head.weight.data.copy_(_load_saved_head(config))
    model.add_module(VALUE_HEAD, head)


def has_value_head(config: ModelConfig) -> bool:
    """Return whether the model was saved with a value head; a language model was not."""
    assert config.name is not None
    folder = resolve_model_folder(config.name)
    return not lacks_value_head(read_hf_config(folder, config.name, config.trust_remote_code))


def _load_saved_head(config: ModelConfig) -> Tensor:
    """Read the weight (1, H) of the saved head."""
    assert config.name is not None
    for file in weight_files(config.name):
        with safe_open(file, framework="pt") as tensors:
            if VALUE_HEAD_WEIGHT in tensors.keys():  # noqa: SIM118 - not a mapping
                return tensors.get_tensor(VALUE_HEAD_WEIGHT)
    raise ModelError(
        config.name,
        f"its weights hold no {VALUE_HEAD_WEIGHT}, the head; name "
        "the folder that medgpt reward wrote, or a language model to give a fresh head",
    )


def build_value_model(
    config: ModelConfig,
    *,
    seed: int,
    dtype: torch.dtype,
    max_length: int | None = None,
    packing: Packing = "auto",
) -> PreTrainedModel:
    """Build a model with a value head to train: a fresh head on a language model, or a saved one.

    Saved adapters are merged. Weights are on the CPU. The caller adds LoRA, if any, and wraps the
    result in a ValueModel. Raises ConfigError if config.name is no such model or lacks weights.
    """
    assert config.name is not None
    options: dict[str, Any] = {"seed": seed, "dtype": dtype, "max_length": max_length}
    options["packing"] = packing
    if has_adapters(config.name):
        return _build_with_merged_adapters(config, **options)
    model = build_model(config, head_kind="value", **options)
    install_value_head(model, config, seed=seed)
    return model


def load_reward_model_info(config: ModelConfig) -> RewardModelInfo:
    """Read score.json of a reward model. Raises ConfigError if it or the head is missing."""
    assert config.name is not None
    name = config.name
    score = RewardModelInfo.read(resolve_model_folder(name, adapters_allowed=True))
    if score is None:
        raise ModelError(
            name,
            f"the folder has no {SCORE_FILE}, so it is no reward model; name "
            "the folder that medgpt reward wrote, runs/NAME/model",
        )
    if not has_adapters(name) and not has_value_head(config):
        raise ModelError(name, f"the folder has {SCORE_FILE} but no head; export the model again")
    return score


def load_value_model(
    name: str,
    *,
    base: ModelConfig | None = None,
    dtype: torch.dtype = torch.float32,
    max_length: int | None = None,
    packing: Packing = "auto",
) -> tuple[ValueModel, RewardModelInfo]:
    """Load a reward model that `medgpt reward` wrote, for scoring, and its score.json.

    Weights are on the CPU and frozen; scores are normalized. Raises ConfigError if `name` is no
    reward model, or its head or the base of its adapters is missing.

    Args:
        base: config of another model of the run, whose attention and trust apply to this one.
    """
    config = ModelConfig(name=name) if base is None else base.with_name(name)
    score = load_reward_model_info(config)
    model = build_value_model(config, seed=0, dtype=dtype, max_length=max_length, packing=packing)
    scorer = ValueModel(model, mean=score.mean, std=score.std)
    return scorer.requires_grad_(False).eval(), score


def _build_with_merged_adapters(config: ModelConfig, **options: Any) -> PreTrainedModel:
    """Build the base model with the adapters in config.name merged, and with their head."""
    from peft import PeftModel  # slow to import, and rarely needed

    assert config.name is not None
    folder = resolve_model_folder(config.name, adapters_allowed=True)
    with safe_open(folder / ADAPTER_SAFE_WEIGHTS_NAME, framework="pt") as tensors:
        if not any(key.endswith(f".{VALUE_HEAD_WEIGHT}") for key in tensors.keys()):  # noqa: SIM118
            # peft would silently use the head of the base
            raise ModelError(config.name, "the adapter has no head; export it again")
    base_config = config.model_copy(update={"name": adapter_base(folder)})
    base = build_value_model(base_config, **options)
    adapted = PeftModel.from_pretrained(base, str(folder))
    model = adapted.merge_and_unload()  # pyright: ignore[reportCallIssue]
    model.name_or_path = config.name  # new adapters store it as their base
    return model.requires_grad_(True).train()

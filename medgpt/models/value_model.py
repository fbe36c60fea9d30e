"""A model that gives every position a number: reward models, which are read at the last token of
an answer, and critics."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from medgpt.config.base import ConfigError
from medgpt.config.model import ModelConfig
from medgpt.data.loader.batch import PackedBatch
from medgpt.models.fetch import local_copy
from medgpt.models.load import SpecialTokenIds, build_model
from medgpt.models.model_files import (
    VALUE_HEAD,
    VALUE_HEAD_WEIGHT,
    lacks_value_head,
    resolve_model_folder,
    weight_files,
)
from medgpt.models.packed import SequenceDropouts, run_backbone, unwrap_peft

if TYPE_CHECKING:
    from peft import PeftModel

SCORE_FILE, SCALE_FILE = "score.json", "value.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModelInfo:
    """What a saved reward model says about its numbers; score.json beside its weights."""

    mean: float  # of the raw scores of the texts it was normalised on
    std: float
    normalised_on: str
    speech: dict[
        str, str
    ]  # digests of what turns a conversation into ids, see tokenizer_fingerprint

    @staticmethod
    def read(folder: Path) -> "RewardModelInfo | None":
        """None for a folder that holds no reward model."""
        file = folder / SCORE_FILE
        return RewardModelInfo(**json.loads(file.read_text("utf-8"))) if file.is_file() else None

    def write(self, folder: Path) -> None:
        (folder / SCORE_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueScale:
    """What a value model's numbers are relative to; value.json beside a critic's weights."""

    mean: float = 0.0
    std: float = 1.0

    @staticmethod
    def load(name: str) -> "ValueScale":
        """Of a critic's or a reward model's folder; of any other model's, that of a fresh head."""
        folder = resolve_value_model_folder(name)
        if (folder / SCALE_FILE).is_file():
            return ValueScale(**json.loads((folder / SCALE_FILE).read_text("utf-8")))
        score = RewardModelInfo.read(folder)
        return ValueScale() if score is None else ValueScale(mean=score.mean, std=score.std)

    def write(self, folder: Path) -> None:
        (folder / SCALE_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")


class ValueModel(nn.Module):
    """A decoder with a head of one output in place of its output layer.

    Args:
        model: of objective "value" (models.load), or the same with LoRA.
        mean, std: of the head's numbers; what `forward` returns is relative to them.
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
        super().__init__()
        self.model = model
        self.mean, self.std = mean, std
        self.dropouts = SequenceDropouts(model)
        if activation_checkpointing:
            self.pretrained.activation_checkpointing_enable({"use_reentrant": False})

    @property
    def pretrained(self) -> PreTrainedModel:
        """The Hugging Face model, with LoRA layers inside where there are any."""
        return unwrap_peft(self.model)

    def forward(self, batch: PackedBatch, *, noise_seeds: Sequence[int] | None = None) -> Tensor:
        """(1, N) float32: the value at every position, of its own piece up to there.

        Args:
            noise_seeds: S seeds, one per piece, for LoRA's dropout.
        """
        if self.training:
            self.dropouts.prepare(batch, noise_seeds)
        hidden = run_backbone(self.pretrained, batch)
        values = self.pretrained.get_submodule(VALUE_HEAD)(hidden)[:, 0]
        return ((values - self.mean) / self.std)[None]


def last_token_values(values: Tensor, batch: PackedBatch) -> Tensor:
    """(S,) the values (1, N) at the last token of each piece: the scores of a reward model."""
    return values[0, batch.cu_seqlens[1:].long() - 1]


class ValueHead(nn.Linear):
    """H to 1 without bias, computed in float32 whatever the dtype of the weights."""

    def __init__(self, hidden_size: int, *, dtype: torch.dtype, seed: int) -> None:
        """Normal weights of variance 1 / (H + 1) as in Stiennon et al., 2020 (2009.01325), B.1."""
        super().__init__(hidden_size, 1, bias=False, dtype=dtype)
        draws = torch.empty(1, hidden_size)
        draws.normal_(std=(hidden_size + 1) ** -0.5, generator=torch.Generator().manual_seed(seed))
        self.weight.data.copy_(draws)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.weight.float())


def install_value_head(model: PreTrainedModel, config: ModelConfig, *, seed: int) -> None:
    """Put a ValueHead in the place of transformers' head: a saved model's own, else a fresh one.

    Raises:
        ConfigError: the model's head is of another kind, or not in its files.
    """
    transformers_head = dict(model.named_children()).get(VALUE_HEAD)
    if not isinstance(transformers_head, nn.Linear) or transformers_head.bias is not None:
        raise ConfigError(
            f"model.name={config.name}: {type(model).__name__} has no linear layer `{VALUE_HEAD}` "
            "without bias as its head; use a model like Qwen, Llama or Mistral"
        )
    head = ValueHead(transformers_head.in_features, dtype=transformers_head.weight.dtype, seed=seed)
    if has_value_head(config):
        head.weight.data.copy_(_load_saved_head(config))
    model.add_module(VALUE_HEAD, head)


def has_value_head(config: ModelConfig) -> bool:
    """Whether the model is saved with a value head, and not a language model."""
    assert config.name is not None
    folder, remote = resolve_model_folder(config.name), config.trust_remote_code
    return not lacks_value_head(AutoConfig.from_pretrained(folder, trust_remote_code=remote))


def _load_saved_head(config: ModelConfig) -> Tensor:
    """(1, H)"""
    assert config.name is not None
    for file in weight_files(config.name):
        with safe_open(file, framework="pt") as tensors:
            if VALUE_HEAD_WEIGHT in tensors.keys():  # noqa: SIM118 - not a mapping
                return tensors.get_tensor(VALUE_HEAD_WEIGHT)
    raise ConfigError(
        f"model.name={config.name}: its weights hold no {VALUE_HEAD_WEIGHT}, the head; name "
        "the folder that medgpt reward wrote, or a language model to give a fresh head"
    )


def build_value_model(
    config: ModelConfig, *, seed: int, dtype: torch.dtype, max_length: int | None = None
) -> PreTrainedModel:
    """To train: a language model with a fresh head, or a reward model or critic with its own.

    Adapters are folded in. Weights are on the CPU. ValueModel wraps it, after LoRA if there is to
    be any.

    Raises:
        ConfigError: config.name is no such model, or its weights lack some.
    """
    assert config.name is not None
    if has_adapters(config.name):
        return _build_with_merged_adapters(config, seed=seed, dtype=dtype, max_length=max_length)
    model = build_model(
        config,
        head_kind="value",
        vocab_size=0,
        special_ids=SpecialTokenIds(),
        seed=seed,
        dtype=dtype,
        max_length=max_length,
    )
    install_value_head(model, config, seed=seed)
    return model


def load_reward_model_info(name: str) -> RewardModelInfo:
    """Facts of a saved reward model. Raises ConfigError: `name` is none, or its head is missing."""
    score = RewardModelInfo.read(resolve_value_model_folder(name))
    if score is None:
        raise ConfigError(
            f"model.name={name}: no {SCORE_FILE} in it, so it is no reward model; name the "
            "folder that medgpt reward wrote, runs/NAME/model"
        )
    if not has_adapters(name) and not has_value_head(ModelConfig(name=name)):
        raise ConfigError(f"model.name={name}: it has {SCORE_FILE} and no head; restore its export")
    return score


def load_value_model(
    name: str, *, dtype: torch.dtype = torch.float32, max_length: int | None = None
) -> tuple[ValueModel, RewardModelInfo]:
    """A reward model as `medgpt reward` wrote it, to score with; and its facts.

    Weights are on the CPU and frozen; scores are normalised.

    Raises:
        ConfigError: `name` is no reward model, its head is missing, or the base of its adapters.
    """
    score, config = load_reward_model_info(name), ModelConfig(name=name)
    model = build_value_model(config, seed=0, dtype=dtype, max_length=max_length)
    scorer = ValueModel(model, mean=score.mean, std=score.std)
    return scorer.requires_grad_(False).eval(), score


def max_positions(config: ModelConfig) -> int | None:
    """Tokens that a model can read, whatever its adapters; None without a limit."""
    assert config.name is not None
    folder, remote = resolve_value_model_folder(config.name), config.trust_remote_code
    if has_adapters(config.name):
        return max_positions(config.model_copy(update={"name": _base_model_name(folder)}))
    hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=remote)
    return hf_config.to_dict().get("max_position_embeddings")


def has_adapters(name: str) -> bool:
    return (resolve_value_model_folder(name) / ADAPTER_CONFIG).is_file()


def resolve_value_model_folder(name: str) -> Path:
    """As resolve_model_folder, which refuses adapters."""
    copy = Path(local_copy(name))
    return copy if (copy / ADAPTER_CONFIG).is_file() else resolve_model_folder(name)


def _build_with_merged_adapters(
    config: ModelConfig, *, seed: int, dtype: torch.dtype, max_length: int | None
) -> PreTrainedModel:
    """The base with the adapters in config.name folded in, and their head."""
    from peft import PeftModel  # which imports a lot, for few

    assert config.name is not None
    folder = resolve_value_model_folder(config.name)
    base_config = config.model_copy(
        update={"name": _base_of_adapter_with_head(config.name, folder)}
    )
    base = build_value_model(base_config, seed=seed, dtype=dtype, max_length=max_length)
    adapted = PeftModel.from_pretrained(base, str(folder))
    model = adapted.merge_and_unload()  # pyright: ignore[reportCallIssue]
    model.name_or_path = config.name  # adapters on top name their base by it
    return model.requires_grad_(True).train()


def _base_of_adapter_with_head(name: str, folder: Path) -> str:
    """The base of an adapter with a head; without one peft would go on with the base's."""
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as tensors:
        head_keys = [key for key in tensors.keys() if key.endswith(f".{VALUE_HEAD_WEIGHT}")]  # noqa: SIM118
    if not head_keys:
        raise ConfigError(f"model.name={name}: its adapter has no head; restore its export")
    return _base_model_name(folder)


def _base_model_name(folder: Path) -> str:
    return str(json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))["base_model_name_or_path"])

"""Find and check the folder, config and weight files of a saved model without loading the model.

Imports no model class of transformers, which would take a second.
"""

import json
from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from medgpt.config.base import ConfigError
from medgpt.config.model import ModelConfig
from medgpt.models.fetch import local_copy

HeadKind = Literal["clm", "mlm", "value"]  # value: one number per position
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
AUTO_CLASS_NAMES = {
    "clm": ("AutoModelForCausalLM", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "mlm": ("AutoModelForMaskedLM", MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "value": (
        "AutoModelForSequenceClassification",
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
}
VALUE_HEAD = "score"  # transformers' name for the head of a decoder with a classifier
VALUE_HEAD_WEIGHT = f"{VALUE_HEAD}.weight"


def weight_files(name: str) -> list[Path]:
    """Return the safetensors files of model `name`, a folder, URI or hub id.

    Raises:
        ConfigError: the model has no safetensors files, or one of them is missing.
    """
    folder = resolve_model_folder(name)
    if (folder / INDEX).is_file():
        shards = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values()
        files = [folder / shard for shard in sorted(set(shards))]
    else:
        files = [folder / WEIGHTS]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ConfigError(
            f"model.name={name}: there is no {missing[0]} in {folder}; only safetensors are read, "
            "save other weights with save_pretrained first"
        )
    return files


def resolve_model_folder(name: str) -> Path:
    """Return the local folder of model `name`; a hub id or URI is downloaded and cached.

    Raises:
        ConfigError: there is no such folder or hub model, or it has no config.json.
    """
    copy = Path(local_copy(name))
    folder = copy if copy.is_absolute() else _download(name)
    if not folder.is_dir():
        raise ConfigError(f"model.name={name}: no such folder; give a folder, a URI or a hub id")
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        remedy = (
            "it is a LoRA adapter; merge it into its base model first"
            if adapter
            else "give the model folder of an earlier run, runs/NAME/model"
        )
        raise ConfigError(f"model.name={name}: the folder has no config.json; {remedy}")
    return folder


def load_hf_config(config: ModelConfig, head_kind: HeadKind) -> PreTrainedConfig:
    """Return the Hugging Face config of model.name.

    Raises:
        ConfigError: the model cannot be loaded with a head of this kind.
    """
    assert config.name is not None
    folder = resolve_model_folder(config.name)
    try:
        hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (ValueError, OSError) as error:
        raise ConfigError(f"model.name={config.name}: {error}") from None
    _check_architecture(config.name, hf_config, head_kind)
    if head_kind == "value":
        _check_num_labels(config.name, hf_config)
        hf_config.num_labels = 1
    return hf_config


def compatible_architectures(hf_config: PreTrainedConfig, head_kind: HeadKind) -> set[str]:
    """Return the class names of which config.architectures must list one.

    transformers itself is less strict: it would also load a BERT as a causal model.
    """
    auto, mapping = AUTO_CLASS_NAMES[head_kind]
    remote = (hf_config.to_dict().get("auto_map") or {}).get(auto)
    names = {name.split(".")[-1] for name in (remote, mapping.get(hf_config.model_type)) if name}
    if head_kind == "value":
        names |= compatible_architectures(hf_config, "clm")  # a head is added
    if head_kind == "mlm":  # has a second head, which is not loaded
        names |= {fit.replace("ForMaskedLM", "ForPreTraining") for fit in names}
    return names


def _check_architecture(name: str, hf_config: PreTrainedConfig, head_kind: HeadKind) -> None:
    compatible, architectures = (
        compatible_architectures(hf_config, head_kind),
        hf_config.architectures or [],
    )
    if not compatible.intersection(architectures):
        reader = "a value head" if head_kind == "value" else f"objective.kind={head_kind}"
        raise ConfigError(
            f"model.name={name}: config.json names {', '.join(architectures) or 'no architecture'}"
            f", {reader} needs {' or '.join(sorted(compatible)) or 'another model'}"
        )


def lacks_value_head(hf_config: PreTrainedConfig) -> bool:
    """Return whether this is a language model, to which a value head must be added."""
    causal = compatible_architectures(hf_config, "clm")
    return bool(causal.intersection(hf_config.architectures or []))


def _check_num_labels(name: str, hf_config: PreTrainedConfig) -> None:
    if not lacks_value_head(hf_config) and hf_config.num_labels != 1:
        raise ConfigError(
            f"model.name={name}: its head has {hf_config.num_labels} outputs, a reward or value "
            "model needs one; name a language model or the result of medgpt reward"
        )


def check_max_length(hf_config: PreTrainedConfig, max_length: int | None) -> None:
    """Raise ConfigError if `max_length` exceeds the positions of the model."""
    positions = hf_config.to_dict().get("max_position_embeddings")
    if max_length is not None and positions is not None and max_length > positions:
        raise ConfigError(
            f"data.max_length={max_length} exceeds the model's {positions} positions; lower it"
        )


def _download(name: str) -> Path:
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise ConfigError(
            f"model.name={name}: there is no such folder, and the Hugging Face hub answered with "
            f"{type(error).__name__}; check the spelling, the network and HF_TOKEN"
        ) from None

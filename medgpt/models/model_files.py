"""Find and check the folder, config and weight files of a saved model without loading the model.

Imports no model class of transformers, which would take a second.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from huggingface_hub import snapshot_download
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE, SAFETENSORS_SINGLE_FILE
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from medgpt.config.base import ConfigError, ModelError
from medgpt.config.model import ModelConfig, RopeScalingConfig
from medgpt.models.fetch import local_copy
from medgpt.models.rope import scale_rope

if TYPE_CHECKING:
    import torch

HeadKind = Literal["clm", "mlm", "value"]  # value: one number per position
AUTO_CLASS_NAMES = {
    "clm": ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "mlm": ("AutoModelForMaskedLM", modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "value": (
        "AutoModelForSequenceClassification",
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
}
ADAPTER_BASE_FILE = "adapter_base.json"
VALUE_HEAD = "score"  # transformers' name for the head of a decoder with a classifier
VALUE_HEAD_WEIGHT = f"{VALUE_HEAD}.weight"


def weight_files(name: str) -> list[Path]:
    """Return the safetensors files of model `name`; raise ConfigError if one is missing."""
    folder = resolve_model_folder(name)
    files, index = [folder / SAFETENSORS_SINGLE_FILE], folder / SAFETENSORS_INDEX_FILE
    if index.is_file():
        shards = json.loads(index.read_text("utf-8"))["weight_map"].values()
        files = [folder / shard for shard in sorted(set(shards))]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ModelError(
            name,
            f"there is no {missing[0]} in {folder}; only safetensors are read, "
            "save other weights with save_pretrained first",
        )
    return files


def check_no_missing_weights(name: str, missing: Iterable[str], head_kind: HeadKind) -> None:
    """Raise ConfigError if weights of model `name` are missing, other than a value head."""
    missing = [weight for weight in missing if (weight, head_kind) != (VALUE_HEAD_WEIGHT, "value")]
    if missing:
        raise ModelError(name, f"{len(missing)} weights are missing, such as {missing[0]}")


def resolve_model_folder(name: str, *, adapters_allowed: bool = False) -> Path:
    """Return the local folder of model `name`; a hub id or URI is downloaded and cached.

    Raises ConfigError if there is no such folder or hub model, or it has no config.json.
    """
    folder = Path(local_copy(name))
    if adapters_allowed and has_adapters(name):
        return folder
    if not folder.is_absolute():
        folder = _download(name)
    if not folder.is_dir():
        raise ModelError(name, "no such folder; give a folder, a URI or a hub id")
    if not (folder / "config.json").is_file():
        remedy = (
            "it is a LoRA adapter; merge it into its base model first"
            if has_adapters(name)
            else "give the model folder of an earlier run, runs/NAME/model"
        )
        raise ModelError(name, f"the folder has no config.json; {remedy}")
    return folder


def has_adapters(name: str | Path) -> bool:
    """Return whether the folder or URI holds LoRA adapters."""
    return (Path(local_copy(str(name))) / ADAPTER_CONFIG_NAME).is_file()


def adapter_base(folder: Path) -> str:
    """Return the name of the base model of the adapters in `folder`."""
    adapter_config = json.loads((folder / ADAPTER_CONFIG_NAME).read_text("utf-8"))
    return str(adapter_config["base_model_name_or_path"])


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterBase:
    """How the base model of adapters was changed when they were trained; adapter_base.json."""

    quantize: Literal["nf4", "int8"] | None = None
    dtype: str = "float32"
    """Of the activations, to which quantized weights are dequantized."""
    rope_scaling: RopeScalingConfig | None = None

    @staticmethod
    def of(config: ModelConfig, dtype: "torch.dtype") -> "AdapterBase":
        """Return what a run with this config changes."""
        return AdapterBase(
            quantize=config.lora.quantize,
            dtype=str(dtype).removeprefix("torch."),
            rope_scaling=config.rope_scaling,
        )

    @staticmethod
    def read(folder: Path) -> "AdapterBase":
        """Read the file; without one, the base is as it was saved."""
        file = folder / ADAPTER_BASE_FILE
        if not file.is_file():
            return AdapterBase()
        tree = json.loads(file.read_text("utf-8"))
        rope = tree["rope_scaling"]
        return AdapterBase(
            quantize=tree["quantize"],
            dtype=tree["dtype"],
            rope_scaling=None if rope is None else RopeScalingConfig.model_validate(rope),
        )

    def write(self, folder: Path) -> None:
        """Write the file if the base is changed."""
        if self.quantize is None and self.rope_scaling is None:
            return
        rope = None if self.rope_scaling is None else self.rope_scaling.model_dump()
        tree = {"quantize": self.quantize, "dtype": self.dtype, "rope_scaling": rope}
        (folder / ADAPTER_BASE_FILE).write_text(json.dumps(tree, indent=2) + "\n", "utf-8")


def max_positions(hf_config: PreTrainedConfig) -> int | None:
    """Return the number of tokens that the model can read; None: no limit."""
    return hf_config.get_text_config().to_dict().get("max_position_embeddings")


def saved_max_positions(config: ModelConfig) -> int | None:
    """Return the number of tokens that the model `config.name`, or its base, can read."""
    assert config.name is not None
    folder = resolve_model_folder(config.name, adapters_allowed=True)
    if has_adapters(folder):
        base = {"name": adapter_base(folder), "rope_scaling": AdapterBase.read(folder).rope_scaling}
        return saved_max_positions(config.model_copy(update=base))
    hf_config = read_hf_config(folder, config.name, config.trust_remote_code)
    if config.rope_scaling is not None:
        scale_rope(hf_config, config.rope_scaling, config.name)
    return max_positions(hf_config)


def read_hf_config(folder: Path, name: str, trust_remote_code: bool) -> PreTrainedConfig:
    """Return the Hugging Face config of the model `name` in `folder`.

    Raises ConfigError if it cannot be read, or needs Python code that is not trusted.
    """
    if not trust_remote_code and _has_code_of_its_own(folder):  # transformers would ask
        raise ModelError(
            name,
            "it comes with Python code of its own (remote code), which does not run by default; "
            "read the code, then set model.trust_remote_code=true",
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError) as error:
        raise ModelError(name, f"{error}") from None


def _has_code_of_its_own(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except json.JSONDecodeError:
        return False  # AutoConfig says what is wrong
    return "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING


def load_hf_config(config: ModelConfig, head_kind: HeadKind) -> PreTrainedConfig:
    """Return the Hugging Face config of model.name.

    Raises ConfigError if the model cannot be loaded with a head of this kind.
    """
    assert config.name is not None
    folder = resolve_model_folder(config.name)
    hf_config = read_hf_config(folder, config.name, config.trust_remote_code)
    if quantization := hf_config.to_dict().get("quantization_config"):
        raise ModelError(
            config.name,
            f"its weights are quantized ({quantization.get('quant_method')}), and only bf16 and "
            "fp32 weights are trained; name a checkpoint of the same model that is not quantized",
        )
    if config.rope_scaling is not None:
        scale_rope(hf_config, config.rope_scaling, config.name)
    compatible = compatible_architectures(hf_config, head_kind)
    architectures = hf_config.architectures or []
    if not compatible.intersection(architectures):
        reader = "a value head" if head_kind == "value" else f"objective.kind={head_kind}"
        raise ModelError(
            config.name,
            f"config.json names {', '.join(architectures) or 'no architecture'}"
            f", {reader} needs {' or '.join(sorted(compatible)) or 'another model'}",
        )
    if head_kind == "value":
        if not _own_architecture(hf_config, "value"):
            raise ModelError(
                config.name,
                f"neither transformers nor the model's code has a {AUTO_CLASS_NAMES['value'][0]} "
                f"for {hf_config.model_type}, as a reward model or critic needs; "
                "use a model like Qwen, Llama or Mistral",
            )
        if not lacks_value_head(hf_config) and hf_config.num_labels != 1:
            raise ModelError(
                config.name,
                f"its head has {hf_config.num_labels} outputs, a reward or value "
                "model needs one; name a language model or the result of medgpt reward",
            )
        hf_config.num_labels = 1
    return hf_config


def compatible_architectures(hf_config: PreTrainedConfig, head_kind: HeadKind) -> set[str]:
    """Return the class names of which config.architectures must list one.

    transformers itself is less strict: it would also load a BERT as a causal model.
    """
    names = _own_architecture(hf_config, head_kind)
    if head_kind == "value":
        names |= compatible_architectures(hf_config, "clm")  # a head is added
    if head_kind == "mlm":  # has a second head, which is not loaded
        names |= {fit.replace("ForMaskedLM", "ForPreTraining") for fit in names}
    return names


def _own_architecture(hf_config: PreTrainedConfig, head_kind: HeadKind) -> set[str]:
    """Return the class names with this head, of the model's own code and of transformers."""
    auto, mapping = AUTO_CLASS_NAMES[head_kind]
    remote = (hf_config.to_dict().get("auto_map") or {}).get(auto)
    return {name.split(".")[-1] for name in (remote, mapping.get(hf_config.model_type)) if name}


def lacks_value_head(hf_config: PreTrainedConfig) -> bool:
    """Return whether this is a language model, to which a value head must be added."""
    causal = compatible_architectures(hf_config, "clm")
    return bool(causal.intersection(hf_config.architectures or []))


def check_max_length(hf_config: PreTrainedConfig, max_length: int | None) -> None:
    """Raise ConfigError if `max_length` exceeds the positions of the model."""
    positions = max_positions(hf_config)
    if max_length is not None and positions is not None and max_length > positions:
        raise ConfigError(
            f"data.max_length={max_length} exceeds the model's {positions} positions; lower it"
        )


def _download(name: str) -> Path:
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError:
        reason = "neither a folder nor an id of the Hugging Face hub; check the spelling"
    except RepositoryNotFoundError:
        reason = (
            "neither a folder nor a model on the Hugging Face hub that you can read; check the "
            "spelling, or set HF_TOKEN"
        )
    except (LocalEntryNotFoundError, HfHubHTTPError):
        reason = (
            "not a folder, and the Hugging Face hub cannot be reached; check the spelling or "
            "the network"
        )
    raise ModelError(name, reason)

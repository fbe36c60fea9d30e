"""`medgpt merge`: merge LoRA adapters into their base model."""

from pathlib import Path

from medgpt.config.base import ConfigError
from medgpt.config.model import ModelConfig
from medgpt.models.fetch import existing_model_folder
from medgpt.models.lora import load_merged
from medgpt.models.model_files import ADAPTER_CONFIG_NAME, AdapterBase, has_adapters
from medgpt.models.tokenizer import load_tokenizer
from medgpt.models.value_model import RewardModelInfo, load_value_model
from medgpt.models.weight_layout import prefer_hub_layout


def merge_adapter(adapter: str, out: Path, trust_remote_code: bool = False) -> None:
    """Merge the adapters of a LoRA run or model folder into the base and save the model to `out`.

    Raises:
        ConfigError: there is no adapter, its base is missing, or `out` is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"OUT={out} exists and is not empty; name a new folder")
    folder = existing_model_folder(adapter)
    if not has_adapters(folder):
        raise ConfigError(
            f"RUN={adapter} holds no LoRA adapters: there is no {ADAPTER_CONFIG_NAME}; name a run "
            "trained with model.lora.rank > 0"
        )
    score = RewardModelInfo.read(folder)
    if score is not None:  # a reward model
        config = ModelConfig(name=str(folder), trust_remote_code=trust_remote_code)
        model = load_value_model(str(folder), base=config)[0].pretrained
        tokenizer = load_tokenizer(str(folder), trust_remote_code)
    else:
        model, tokenizer = load_merged(folder, trust_remote_code=trust_remote_code)
        if (kind := AdapterBase.read(folder).quantize) is not None:
            print(
                f"merge: the base was trained on in {kind}: its weights are dequantized, and the "
                "merged model is in fp32"
            )
    prefer_hub_layout(model)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    if score is not None:
        score.write(out)

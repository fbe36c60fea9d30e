"""Write what an export of a model has besides weights and tokenizer."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save


def save_config(model: PreTrainedModel, directory: Path) -> None:
    """Write config.json, and the Python files of a model with code of its own."""
    model.config.architectures = [type(model).__name__]
    if model.is_remote_code():
        config: Any = model.config  # annotated as a dict
        custom_object_save(model, directory, config=config)
    model.config.save_pretrained(directory)

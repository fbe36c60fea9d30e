"""A model with Python code of its own, written by the tests."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from tests.models.tiny_models import save_model_with_tokenizer

CODE = Path(__file__).parent / "remote_code" / "modeling_tiny.py"


def save_remote_model(folder: Path, texts: Sequence[str], **changes: object) -> Path:
    """Save a tiny model whose config.json names classes of modeling_tiny.py beside it."""
    save_model_with_tokenizer(folder, texts, kind="llama", **changes)
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    names = {
        "AutoConfig": "TinyConfig",
        "AutoModelForCausalLM": "TinyForCausalLM",
        "AutoModelForSequenceClassification": "TinyForSequenceClassification",
    }
    config |= {
        "model_type": "tiny_remote",
        "architectures": ["TinyForCausalLM"],
        "auto_map": {auto: f"modeling_tiny.{name}" for auto, name in names.items()},
    }
    path.write_text(json.dumps(config), "utf-8")
    shutil.copy(CODE, folder)
    return folder

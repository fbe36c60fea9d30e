"""A trained model as a Hugging Face folder."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from medgpt.engine import Engine
from medgpt.engine.export import gather_weights
from medgpt.models.packed import plain_model


def export_model(engine: Engine, model: Any, tokenizer: Any, directory: Path) -> None:
    """Write `model` and `tokenizer`; under LoRA (a peft model) an adapter folder. Collective."""
    plain = plain_model(model)
    if model is not plain:
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        weights = {n: tensor for n, tensor in gather_weights(model) if n in trained}
        if dist.get_rank() == 0:
            model.save_pretrained(str(directory), state_dict=weights)
    else:
        engine.export(directory, plain)
        if dist.get_rank() == 0:
            plain.config.architectures = [type(plain).__name__]
            plain.config.save_pretrained(directory)
    if dist.get_rank() == 0:
        tokenizer.save_pretrained(directory)

"""Export a trained model as a Hugging Face folder."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from medgpt.engine.export import export_weights, gather_weights
from medgpt.models.packed import unwrap_peft
from medgpt.models.saved_config import save_config
from medgpt.models.stops import set_stops


def export_model(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write `model` (a peft model as an adapter) and `tokenizer` to `directory`. Collective."""
    inner_model = unwrap_peft(model)
    set_stops(inner_model, tokenizer)
    if model is not inner_model:
        trained_names = {name for name, p in model.named_parameters() if p.requires_grad}
        weights = {n: tensor for n, tensor in gather_weights(model) if n in trained_names}
        if dist.get_rank() == 0:
            model.save_pretrained(str(directory), state_dict=weights)
    else:
        export_weights(inner_model, directory)
        if dist.get_rank() == 0:
            save_config(inner_model, directory)
    if dist.get_rank() == 0:
        tokenizer.save_pretrained(directory)
        if inner_model.can_generate():
            inner_model.generation_config.save_pretrained(directory)

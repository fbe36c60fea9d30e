"""Sample generations of a finished model, for the report."""

import torch

from medgpt.config.stages import SFTConfig, TrainStageConfig
from medgpt.models.generate import answer_all, continue_all, load_for_generation
from medgpt.runs import Run

SAMPLES = "samples.json"


def write_samples(run: Run, config: TrainStageConfig, device: torch.device) -> None:
    """Continue (after SFT: answer) the report's prompts greedily, from the exported files."""
    with run.model.local() as directory:
        model, tokenizer = load_for_generation(str(directory), device)
    speak = answer_all if isinstance(config, SFTConfig) else continue_all
    prompts = config.report.prompts
    texts = speak(model, tokenizer, prompts, max_new_tokens=config.report.max_new_tokens)
    pairs = zip(prompts, texts, strict=True)
    run.folder.write_json(SAMPLES, [{"prompt": p, "text": t} for p, t in pairs])

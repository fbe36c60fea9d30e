"""Sample generations of a finished model for the report."""

import torch

from medgpt.config.stages import SFTConfig, TrainStageConfig
from medgpt.models.generate import generate_answers, generate_continuations, load_for_generation
from medgpt.runs import Run

SAMPLES_FILE = "samples.json"


def write_sample_generations(run: Run, config: TrainStageConfig, device: torch.device) -> None:
    """Answer (SFT) or continue the report's prompts greedily with the exported model."""
    with run.model.local() as directory:
        model, tokenizer = load_for_generation(str(directory), device)
    generate = generate_answers if isinstance(config, SFTConfig) else generate_continuations
    prompts = config.report.prompts
    texts = generate(model, tokenizer, prompts, max_new_tokens=config.report.max_new_tokens)
    pairs = zip(prompts, texts, strict=True)
    run.folder.write_json(SAMPLES_FILE, [{"prompt": p, "text": t} for p, t in pairs])

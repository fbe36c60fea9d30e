"""The model card beside an exported model: what it is, from what, and what it is not for."""

from huggingface_hub import ModelCardData

from medgpt.config import TrainStageConfig
from medgpt.runs import Run

WARNING = (
    "Not a medical device. No clinician has reviewed this model: it must not diagnose, treat or "
    "advise anyone."
)


def model_card(run: Run, config: TrainStageConfig) -> str:
    """Markdown with the front matter that Hugging Face reads."""
    manifest, name = run.manifest, config.model.name
    data = manifest["data"]
    facts = ModelCardData(
        language=["zh", "en"],
        library_name="transformers",
        tags=["medical", "medgpt", manifest["stage"]],
        base_model=name if name and not name.startswith("/") and "://" not in name else None,
    )
    rows = [
        f"| {source.name} | {source.licence} | {'yes' if source.sensitive else 'no'} | "
        f"{data['sources'][source.name]['train']:,} |"
        for source in config.data.sources
    ]
    return "\n".join(
        [
            "---",
            facts.to_yaml(),
            "---",
            "",
            f"# {run.folder.url.rsplit('/', 1)[-1]}",
            "",
            WARNING,
            "",
            f"Trained by medgpt {manifest['versions']['medgpt']}, stage {manifest['stage']}, from "
            f"{name or 'fresh weights'}, seed {config.run.seed}.",
            "",
            f"{data['num_samples']:,} samples, {data['num_tokens']:,} tokens an epoch.",
            "",
            "| Source | Licence | Sensitive | Samples |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )

"""The model card of an exported model: origin, data, scores and warning."""

from typing import Any

from huggingface_hub import ModelCardData

from medgpt.artifacts import MANIFEST, FileEntry, Folder, commit, committed
from medgpt.config.data import DataConfig
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.stages import TrainStageConfig
from medgpt.runs import Run

MODEL_CARD_FILE = "README.md"
SCORES_HEADING = "## Evaluation"

WARNING = (
    "Not a medical device. No clinician has reviewed this model: it must not diagnose, treat or "
    "advise anyone."
)


def model_card(run: Run, config: TrainStageConfig | PPOStageConfig) -> str:
    """Return the card as Markdown with the front matter that Hugging Face reads."""
    manifest, name = run.manifest, config.model.name
    data = manifest["data"]
    card_data = ModelCardData(
        language=["zh", "en"],
        library_name="transformers",
        tags=["medical", "medgpt", manifest["stage"]],
        base_model=name if name and not name.startswith("/") and "://" not in name else None,
    )
    lines = _source_lines(config.data, data)
    if isinstance(config, PPOStageConfig) and config.ptx is not None:
        lines += _source_lines(config.ptx.data, manifest["ptx"])
    rows = "\n".join(lines)
    origin = f"stage {manifest['stage']}, from {name or 'fresh weights'}, seed {config.run.seed}"
    return f"""\
---
{card_data.to_yaml()}
---

# {run.folder.name}

{WARNING}

Trained by medgpt {manifest["versions"]["medgpt"]}, {origin}.

{data["num_samples"]:,} samples, {data["num_tokens"]:,} tokens an epoch.

| Source | License | Sensitive | Samples |
|---|---|---|---|
{rows}
"""


def _source_lines(config: DataConfig, manifest: dict[str, Any]) -> list[str]:
    """Return a table row for each source."""
    return [
        f"| {source.name} | {source.license} | {'yes' if source.sensitive else 'no'} | "
        f"{manifest['sources'][source.name]['train']:,} |"
        for source in config.sources
    ]


def add_scores(results: dict[str, Any]) -> None:
    """Write an evaluation's scores into the scored model's card, if medgpt wrote it.

    The manifest no longer lists the card afterwards, so the model stays complete if this is killed
    or runs twice at the same time. Raises OSError if the folder cannot be written.
    """
    model = _find_model_with_card(results["model"])
    if model is None:
        return
    old_card = model.read_text(MODEL_CARD_FILE)
    body = old_card.split(f"\n{SCORES_HEADING}\n")[0].rstrip("\n")
    card = f"{body}\n\n{_score_section(results)}"
    if card == old_card:
        return
    manifest = model.read_json(MANIFEST)
    files = [FileEntry(**file) for file in manifest.pop("files")]
    kept = [file for file in files if file.name != MODEL_CARD_FILE]
    if kept != files:
        commit(model, kept, **manifest)
    model.write_text(MODEL_CARD_FILE, card)


def _find_model_with_card(name: str) -> Folder | None:
    """Return the complete model with a card of the run `name`, or at `name` itself."""
    folders = (Run(name).model, Folder(name))
    return next((f for f in folders if f.exists(MODEL_CARD_FILE) and committed(f)), None)


def _score_section(results: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {task} | {metric} | {score['value']:.4f} | {score['low']:.4f} to {score['high']:.4f} | "
        f"{score['n']} | {result['data_hash']} | {result['template']} |"
        for task, result in results["tasks"].items()
        for metric, score in result["metrics"].items()
    )
    return f"""\
{SCORES_HEADING}

By `medgpt eval`, seed {results["seed"]}; intervals are 95 %.

| Task | Metric | Score | Interval | n | Data | Prompt |
|---|---|---|---|---|---|---|
{rows}
"""

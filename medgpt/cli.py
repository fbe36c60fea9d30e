"""medgpt STAGE CONFIG.toml [section.key=value ...]

Heavy libraries load only after a config has been read and found right.
"""

import importlib
import json
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from medgpt.config import (
    ConfigError,
    CorpusConfig,
    DPOConfig,
    EvalConfig,
    PipelineConfig,
    PPOStageConfig,
    PretrainConfig,
    RewardConfig,
    SFTConfig,
    StageConfig,
    TuneStageConfig,
    absolute_model,
    load,
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train a medical language model. Each stage takes a TOML file; see configs/.",
)
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="A file from configs/.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="section.key=value", help="On top of the file.")
]


@app.command()
def corpus(config: ConfigPath, overrides: Overrides = None) -> None:
    """Write the sample corpus that ships with medgpt."""
    _run("medgpt.data.sample.write:run_corpus", config, _load(CorpusConfig, config, overrides))


@app.command()
def pretrain(config: ConfigPath, overrides: Overrides = None) -> None:
    """Pretrain on documents: next token (clm) or masked tokens (mlm)."""
    _run("medgpt.eval.stages:run_pretrain", config, _load(PretrainConfig, config, overrides))


@app.command()
def sft(config: ConfigPath, overrides: Overrides = None) -> None:
    """Fine-tune on conversations."""
    _run("medgpt.eval.stages:run_sft", config, _load(SFTConfig, config, overrides))


@app.command()
def reward(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train a reward model on preferences: pairs, or several graded answers to a prompt."""
    _run("medgpt.eval.stages:run_reward", config, _load(RewardConfig, config, overrides))


@app.command()
def dpo(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train on preferences without a reward model: DPO, KTO and their kin."""
    _run("medgpt.eval.stages:run_dpo", config, _load(DPOConfig, config, overrides))


@app.command()
def ppo(config: ConfigPath, overrides: Overrides = None) -> None:
    """Learn from rewards: PPO on separate pools of actor, critic, reward, reference, rollout."""
    _run("medgpt.eval.stages:run_ppo", config, _load(PPOStageConfig, config, overrides))


@app.command()
def tune(config: ConfigPath, overrides: Overrides = None) -> None:
    """Search PPO's keys: many trials, the best config, and what it is worth."""
    _run("medgpt.eval.stages:run_tune", config, _load(TuneStageConfig, config, overrides))


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="What to score.")],
    config: ConfigPath,
    overrides: Overrides = None,
) -> None:
    """Score a model: multiple choice, held-out text, replies."""
    named = [
        f"model.name={json.dumps(absolute_model(model), ensure_ascii=False)}",
        *(overrides or ()),
    ]
    _run("medgpt.eval.evaluate:run_eval", config, _load(EvalConfig, config, named))


@app.command()
def pipeline(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run several stages in order on one Ray; finished ones are skipped."""
    _run("medgpt.eval.pipeline:run_pipeline", config, _load(PipelineConfig, config, overrides))


@app.command()
def chat(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A finished run or a model folder.")],
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
) -> None:
    """Talk to a trained model in the terminal."""
    _run("medgpt.models.chat:run_chat", run, run, max_new_tokens, temperature)


@app.command()
def merge(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run trained with LoRA.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the model.")],
) -> None:
    """Fold LoRA adapters into their base model."""
    _run("medgpt.models.lora:merge_adapter", run, run, out)


def main() -> None:
    """The `medgpt` command."""
    app()


def _load(cls: type[StageConfig], path: Path, overrides: list[str] | None) -> StageConfig:
    try:
        return load(cls, path, overrides or ())
    except ConfigError as error:
        _fail(f"{path}: {error}")


def _run(target: str, subject: object, *arguments: object) -> None:
    """Call `module:function`; what the user can repair is printed without a traceback."""
    module, function = target.split(":")
    try:
        getattr(importlib.import_module(module), function)(*arguments)
    except ConfigError as error:
        _fail(f"{subject}: {error}")


def _fail(message: str) -> NoReturn:
    typer.echo(f"medgpt: {message}", err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    main()

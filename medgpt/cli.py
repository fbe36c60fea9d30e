"""The `medgpt` command: medgpt STAGE CONFIG.toml [section.key=value ...]

Heavy libraries are imported only after the config has been loaded and validated.
"""

import importlib
import json
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from medgpt.config.base import ConfigError, absolute_model_path
from medgpt.config.dpo import DPOConfig
from medgpt.config.evaluation import EvalConfig
from medgpt.config.loading import ConfigT, load
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.reward_model import RewardModelConfig
from medgpt.config.stages import CorpusConfig, PipelineConfig, PretrainConfig, SFTConfig
from medgpt.config.tune import TuneStageConfig

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train a medical language model. Each stage takes a TOML file; see configs/.",
)
job = typer.Typer(no_args_is_help=True, help="Show, follow and stop the jobs of `medgpt submit`.")
app.add_typer(job, name="job")
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="A file from configs/.")]
DEFAULT_DASHBOARD = "http://127.0.0.1:8265"
DashboardURL = Annotated[
    str,
    typer.Option(metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="URL of the Ray dashboard."),
]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="Job id or run directory.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="section.key=value", help="Override keys of the file.")
]


@app.command()
def corpus(config: ConfigPath, overrides: Overrides = None) -> None:
    """Write the sample corpus that ships with medgpt."""
    _call("medgpt.stages.corpus:run_corpus", config, _load_config(CorpusConfig, config, overrides))


@app.command()
def pretrain(config: ConfigPath, overrides: Overrides = None) -> None:
    """Pretrain on documents: next token (clm) or masked tokens (mlm)."""
    _call(
        "medgpt.stages.train:run_pretrain", config, _load_config(PretrainConfig, config, overrides)
    )


@app.command()
def sft(config: ConfigPath, overrides: Overrides = None) -> None:
    """Fine-tune on conversations."""
    _call("medgpt.stages.train:run_sft", config, _load_config(SFTConfig, config, overrides))


@app.command()
def reward(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train a reward model on preferences: pairs, or several graded answers to a prompt."""
    _call(
        "medgpt.stages.train:run_reward", config, _load_config(RewardModelConfig, config, overrides)
    )


@app.command()
def dpo(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train on preferences without a reward model: DPO, KTO and variants."""
    _call("medgpt.stages.dpo:run_dpo", config, _load_config(DPOConfig, config, overrides))


@app.command()
def ppo(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train with PPO on separate pools: actor, critic, reward, reference, rollout."""
    _call("medgpt.stages.ppo:run_ppo", config, _load_config(PPOStageConfig, config, overrides))


@app.command()
def tune(config: ConfigPath, overrides: Overrides = None) -> None:
    """Search hyperparameters of PPO and check the best config on fresh questions."""
    _call("medgpt.stages.tune:run_tune", config, _load_config(TuneStageConfig, config, overrides))


@app.command(name="eval")
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="The run or model to score.")
    ],
    config: ConfigPath,
    overrides: Overrides = None,
) -> None:
    """Score a model on multiple choice, held-out text and replies."""
    overrides_with_model = [
        f"model.name={json.dumps(absolute_model_path(model), ensure_ascii=False)}",
        *(overrides or ()),
    ]
    _call(
        "medgpt.stages.evaluate:run_eval",
        config,
        _load_config(EvalConfig, config, overrides_with_model),
    )


@app.command()
def pipeline(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run several stages in order on one Ray; finished ones are skipped."""
    _call(
        "medgpt.stages.pipeline:run_pipeline",
        config,
        _load_config(PipelineConfig, config, overrides),
    )


@app.command()
def plan(
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="pretrain, sft, reward, dpo, ppo.")],
    config: ConfigPath,
    cluster: Annotated[Path, typer.Option(help="A Ray cluster definition from clusters/.")],
    overrides: Overrides = None,
    hardware: Annotated[
        Path | None,
        typer.Option(help="File with prices and devices; default: CLUSTER with the suffix .toml."),
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(help="Tokens to train on, such as 2e9.", min=1)
    ] = None,
    mfu: Annotated[
        float, typer.Option(help="Assumed share of the peak FLOP/s.", min=0.01, max=1)
    ] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="Print all numbers as JSON.")] = False,
) -> None:
    """Estimate the memory, nodes, time and cost of a stage on a cluster."""
    arguments = (stage, config, overrides or [], cluster, hardware, tokens, mfu, as_json)
    _call("medgpt.stages.plan:run_plan", config, *arguments)


@app.command()
def submit(
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="The command to run, such as sft.")],
    config: ConfigPath,
    overrides: Overrides = None,
    address: DashboardURL = DEFAULT_DASHBOARD,
    secret_env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=FILE]", help="Secret that the job reads on the nodes."),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Do not wait until the job ends.")
    ] = False,
) -> None:
    """Run a stage or a pipeline on a Ray cluster; submit it again to resume it."""
    arguments = (stage, config, overrides or [], address, secret_env or [], detach)
    raise typer.Exit(_call("medgpt.jobs.submit:run_submit", config, *arguments))


@job.command()
def status(
    name: Annotated[str | None, typer.Argument(metavar="JOB", help="Default: all jobs.")] = None,
    address: DashboardURL = DEFAULT_DASHBOARD,
) -> None:
    """Show the status of jobs."""
    _call("medgpt.jobs.submit:run_status", "job status", name, address)


@job.command()
def logs(
    name: JobName,
    address: DashboardURL = DEFAULT_DASHBOARD,
    follow: Annotated[bool, typer.Option("--follow", help="Follow until the job ends.")] = False,
) -> None:
    """Show the output of a job."""
    raise typer.Exit(_call("medgpt.jobs.submit:run_logs", name, name, address, follow))


@job.command()
def stop(name: JobName, address: DashboardURL = DEFAULT_DASHBOARD) -> None:
    """Stop a job; submit it again to resume it."""
    _call("medgpt.jobs.submit:run_stop", name, name, address)


@app.command()
def chat(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A finished run or a model folder.")],
    max_new_tokens: Annotated[int, typer.Option(help="Maximum length of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: greedy decoding.")] = 0.0,
) -> None:
    """Chat with a trained model in the terminal."""
    _call("medgpt.stages.chat:run_chat", run, run, max_new_tokens, temperature)


@app.command()
def merge(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run trained with LoRA.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the model.")],
) -> None:
    """Merge LoRA adapters into their base model."""
    _call("medgpt.stages.merge:merge_adapter", run, run, out)


def main() -> None:
    """Run the command line interface."""
    app()


def _load_config(cls: type[ConfigT], path: Path, overrides: list[str] | None) -> ConfigT:
    try:
        return load(cls, path, overrides or ())
    except ConfigError as error:
        _exit_with_error(f"{path}: {error}")


def _call(target: str, subject: object, *arguments: object) -> Any:
    """Call `module:function`; print a ConfigError without a traceback, exit with status 2."""
    module, function = target.split(":")
    try:
        return getattr(importlib.import_module(module), function)(*arguments)
    except ConfigError as error:
        _exit_with_error(f"{subject}: {error}")


def _exit_with_error(message: str) -> NoReturn:
    typer.echo(f"medgpt: {message}", err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    main()

"""The `medgpt` command: medgpt STAGE CONFIG.toml [section.key=value ...]

Heavy libraries are imported only after the config has been loaded and validated.
"""

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from medgpt.config.base import ConfigError, absolute_model_path
from medgpt.config.dpo import DPOConfig
from medgpt.config.evaluation import EvalConfig
from medgpt.config.loading import ConfigT, load
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.reward_model import RewardModelConfig
from medgpt.config.stages import CorpusConfig, PipelineConfig, PretrainConfig, SFTConfig
from medgpt.config.tune import TuneStageConfig


class CommandGroup(TyperGroup):
    """Lists subgroups after commands, so that `job` does not come first in the help."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: name == "job")


app = typer.Typer(
    cls=CommandGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train a medical language model. Each stage takes a TOML file; see configs/.",
)
TRAIN, EVALUATE, CLUSTER = "Train", "Evaluate", "Cluster"  # panels of the help
job = typer.Typer(no_args_is_help=True, help="Show, follow and stop the jobs of `medgpt submit`.")
app.add_typer(job, name="job", rich_help_panel=CLUSTER)
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="A file from configs/.")]
DEFAULT_DASHBOARD = "http://127.0.0.1:8265"
DashboardURL = Annotated[
    str,
    typer.Option(metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="URL of the Ray dashboard."),
]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="Job id or run directory.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="section.key=value", help="Override keys of the file."),
]


@app.command(rich_help_panel=TRAIN)
def corpus(config: ConfigPath, overrides: Overrides = None) -> None:
    """Write the sample corpus that ships with medgpt."""
    _run_stage("medgpt.stages.corpus:run_corpus", CorpusConfig, config, overrides)


@app.command(rich_help_panel=TRAIN)
def pretrain(config: ConfigPath, overrides: Overrides = None) -> None:
    """Pretrain on documents: next token (clm) or masked tokens (mlm)."""
    _run_stage("medgpt.stages.train:run_pretrain", PretrainConfig, config, overrides)


@app.command(rich_help_panel=TRAIN)
def sft(config: ConfigPath, overrides: Overrides = None) -> None:
    """Fine-tune on conversations."""
    _run_stage("medgpt.stages.train:run_sft", SFTConfig, config, overrides)


@app.command(rich_help_panel=TRAIN)
def reward(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train a reward model on preferences: pairs, or several graded answers to a prompt."""
    _run_stage("medgpt.stages.train:run_reward", RewardModelConfig, config, overrides)


@app.command(rich_help_panel=TRAIN)
def dpo(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train on preferences without a reward model: DPO, KTO and variants."""
    _run_stage("medgpt.stages.dpo:run_dpo", DPOConfig, config, overrides)


@app.command(rich_help_panel=TRAIN)
def ppo(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train with PPO on separate pools: actor, critic, reward, reference, rollout."""
    _run_stage("medgpt.stages.ppo:run_ppo", PPOStageConfig, config, overrides)


@app.command(rich_help_panel=TRAIN)
def tune(config: ConfigPath, overrides: Overrides = None) -> None:
    """Search hyperparameters of PPO and check the best config on fresh questions."""
    _run_stage("medgpt.stages.tune:run_tune", TuneStageConfig, config, overrides)


@app.command(rich_help_panel=TRAIN)
def pipeline(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run several stages in order on one Ray; finished ones are skipped."""
    _run_stage("medgpt.stages.pipeline:run_pipeline", PipelineConfig, config, overrides)


@app.command(name="eval", rich_help_panel=EVALUATE)
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="The run or model to score.")
    ],
    config: ConfigPath,
    overrides: Overrides = None,
) -> None:
    """Score a model on multiple choice, held-out text and replies."""
    name = f"model.name={json.dumps(absolute_model_path(model), ensure_ascii=False)}"
    _run_stage("medgpt.stages.evaluate:run_eval", EvalConfig, config, [name, *(overrides or ())])


@app.command(rich_help_panel=EVALUATE)
def chat(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A finished run or a model folder.")],
    max_new_tokens: Annotated[int, typer.Option(help="Maximum length of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: greedy decoding.")] = 0.0,
    thinking: Annotated[
        bool | None, typer.Option(help="Think before answering; default: as the model does.")
    ] = None,
    thinking_tokens: Annotated[
        int | None, typer.Option(help="Maximum length of a thought, which is then ended.", min=1)
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Chat with a trained model in the terminal."""
    arguments = (max_new_tokens, temperature, thinking, thinking_tokens, trust_remote_code)
    _call("medgpt.stages.chat:run_chat", run, *arguments)


@app.command(rich_help_panel=EVALUATE)
def merge(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run trained with LoRA.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the model.")],
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Merge LoRA adapters into their base model."""
    _call("medgpt.stages.merge:merge_adapter", run, out, trust_remote_code)


@app.command(rich_help_panel=CLUSTER)
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
    _call("medgpt.stages.plan:run_plan", *arguments, source=config)


@app.command(rich_help_panel=CLUSTER)
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
    raise typer.Exit(_call("medgpt.jobs.submit:run_submit", *arguments, source=config))


@job.command()
def status(
    name: Annotated[str | None, typer.Argument(metavar="JOB", help="Default: all jobs.")] = None,
    address: DashboardURL = DEFAULT_DASHBOARD,
) -> None:
    """Show the status of jobs."""
    _call("medgpt.jobs.submit:run_status", name, address)


@job.command()
def logs(
    name: JobName,
    address: DashboardURL = DEFAULT_DASHBOARD,
    follow: Annotated[bool, typer.Option("--follow", help="Follow until the job ends.")] = False,
) -> None:
    """Show the output of a job."""
    raise typer.Exit(_call("medgpt.jobs.submit:run_logs", name, address, follow))


@job.command()
def stop(name: JobName, address: DashboardURL = DEFAULT_DASHBOARD) -> None:
    """Stop a job; submit it again to resume it."""
    _call("medgpt.jobs.submit:run_stop", name, address)


def main() -> None:
    """Run the command line interface."""
    app()


def _run_stage(target: str, cls: type[ConfigT], path: Path, overrides: list[str] | None) -> None:
    """Load the config, then call `module:function` with it."""
    with _exit_on_config_error(path):
        config = load(cls, path, overrides or ())
    _call(target, config, source=path)


def _call(target: str, *arguments: object, source: Path | None = None) -> Any:
    """Call `module:function`; `source` is the config file that errors are about."""
    module, function = target.split(":")
    with _exit_on_config_error(source):
        return getattr(importlib.import_module(module), function)(*arguments)


@contextmanager
def _exit_on_config_error(source: Path | None) -> Iterator[None]:
    """Print a ConfigError without a traceback and exit with status 2.

    The message starts with the config file, unless it is about an option or argument.
    """
    try:
        yield
    except ConfigError as error:
        is_about_config = source is not None and not str(error).startswith(("--", "STAGE="))
        typer.echo(
            f"medgpt: {source}: {error}" if is_about_config else f"medgpt: {error}", err=True
        )
        raise typer.Exit(2) from None


if __name__ == "__main__":
    main()

"""What a search needs before its first trial: the base that trials share, and how many fit."""

from collections.abc import Mapping

from medgpt.cluster.capacity import check, cluster_nodes, of_pools
from medgpt.cluster.concurrent_trials import concurrent_trials
from medgpt.config.base import ConfigError
from medgpt.config.loading import with_values
from medgpt.config.pools import RoleConfig
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.tune import FROZEN, TuneStageConfig
from medgpt.metrics import ConsoleReporter
from medgpt.rlhf.setup import prepare_prompts, role_pools
from medgpt.runs import Run
from medgpt.tune.space import listed

WIDEST = (
    "ppo.rollout_batch_size",
    "ppo.micro_batch_tokens",
    "ppo.epochs",
    "rollout.max_new_tokens",
    "ptx.batch_size",
)
NARROWEST = ("ppo.global_batch_size",)
PBT_STATES = 4  # newest checkpoints that a trial keeps for those who copy it


def for_trials(config: TuneStageConfig) -> PPOStageConfig:
    """The base with what the search sets for all trials: they are judged by a part of the
    questions, saved when they are judged, and keep no samples of other trials' pools."""
    stage = config.stage
    low, high = stage.judge.part
    share = config.check.share if config.check.seeds else 0.0
    keep = PBT_STATES if config.tune.scheduler == "pbt" else 1
    values = {
        "judge.part": [low, high - share * (high - low)],
        "ppo.checkpoint_every": stage.judge.every,
        "ppo.keep_checkpoints": max(keep, stage.ppo.keep_checkpoints),
        "report.samples": 0,
    }
    return with_values(PPOStageConfig, stage, values)


def widest(config: TuneStageConfig, stage: PPOStageConfig) -> PPOStageConfig:
    """With the largest of what decides how much room shared things need."""
    search = config.search
    found = {key: max(search[key].extremes) for key in WIDEST if key in search}
    found |= {key: min(search[key].extremes) for key in NARROWEST if key in search}
    return _unchecked(stage, found)


def _unchecked(stage: PPOStageConfig, values: Mapping[str, object]) -> PPOStageConfig:
    """Largest values need not go together: no trial has all of them."""
    for key, value in values.items():
        section, name = key.split(".")
        part = getattr(stage, section).model_copy(update={name: value})
        stage = stage.model_copy(update={section: part})
    return stage


def base_run(config: TuneStageConfig) -> Run:
    """A run directory for what all trials have in common: the base's config, and its prompts.

    Raises:
        ConfigError: the base has changed since the search began.
    """
    stage, allowed = config.stage, config.run.allow_changes
    return Run.open("ppo", stage, run_dir=stage.run.dir, allow_changes=allowed)


def count_trials(config: TuneStageConfig) -> int:
    """Trials at a time.

    Raises:
        ConfigError: none has room beside the shared pools, or not all that PBT compares.
    """
    stage, tune = config.stage, config.tune
    roles = {pool.role: pool.config for pool in role_pools(stage, 1)}
    present, addable = cluster_nodes()
    data_cpus = stage.cluster.data_cpus
    check(of_pools(roles), present, addable, data_cpus=data_cpus)
    shared: dict[str, RoleConfig] = {}
    if tune.shared_pools:
        shared = {name: config for name, config in roles.items() if name in FROZEN}
    trial = {name: config for name, config in roles.items() if name not in shared}
    num_trials = tune.num_trials if tune.searcher == "tpe" else len(listed(config))
    room = max(
        concurrent_trials(trial, shared, nodes, data_cpus=data_cpus, limit=num_trials)
        for nodes in (present, addable)
    )
    if tune.scheduler == "pbt" and room < num_trials:
        raise ConfigError(
            "tune.scheduler=pbt compares all trials at the same time, and the cluster has room for "
            f"{room} of tune.num_trials={num_trials}; lower it or what pools need in the base, or "
            "use a larger cluster"
        )
    return min(max(room, 1), tune.max_concurrent or num_trials)


def prepare_base(base: Run, config: TuneStageConfig, reporter: ConsoleReporter) -> None:
    """The prompts of all trials. Raises ConfigError if there are too few."""
    largest = widest(config, config.stage)
    plan, ppo = prepare_prompts(base, largest, reporter), largest.ppo
    if plan.num_steps != ppo.max_iterations:
        raise ConfigError(
            f"base: ppo.max_iterations={ppo.max_iterations}: the prompts end after "
            f"{plan.num_steps} iterations of {ppo.rollout_batch_size}; raise ppo.prompt_epochs or "
            "lower it"
        )

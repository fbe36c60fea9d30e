"""Preparations of a search: the configs that trials share, and how many trials run at a time."""

from collections.abc import Callable, Iterable
from typing import Any

from medgpt.cluster.capacity import (
    check_demands,
    cluster_nodes,
    max_concurrent_trials,
    pool_demands,
)
from medgpt.config.base import ConfigError
from medgpt.config.loading import with_values
from medgpt.config.pools import RoleConfig
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.tune import SHARED_ROLES, TuneStageConfig
from medgpt.metrics import ConsoleReporter
from medgpt.rlhf.setup import build_role_pools, prepare_prompts
from medgpt.runs import Run
from medgpt.tune.space import list_trial_params

SIZE_KEYS: dict[str, Callable[[Iterable[Any]], Any]] = {  # which value needs the most memory
    "ppo.rollout_batch_size": max,
    "ppo.micro_batch_tokens": max,
    "ppo.epochs": max,
    "rollout.max_new_tokens": max,
    "ptx.batch_size": max,
    "ppo.global_batch_size": min,
}
PBT_CHECKPOINTS = 4  # newest checkpoints of a trial, kept for trials that copy it


def config_for_trials(config: TuneStageConfig) -> PPOStageConfig:
    """Return the base config with what the search sets for all trials: they are judged on a part of
    the questions, write a checkpoint at every judge evaluation, and report no samples."""
    ppo_config = config.base_config
    low, high = ppo_config.judge.hash_range
    share = config.check.share if config.check.seeds else 0.0
    keep = PBT_CHECKPOINTS if config.tune.scheduler == "pbt" else 1
    values = {
        "judge.hash_range": [low, high - share * (high - low)],
        "ppo.checkpoint_every": ppo_config.judge.every,
        "ppo.keep_checkpoints": max(keep, ppo_config.ppo.keep_checkpoints),
        "report.samples": 0,
    }
    return with_values(PPOStageConfig, ppo_config, values)


def largest_config(config: TuneStageConfig, ppo_config: PPOStageConfig) -> PPOStageConfig:
    """Return a config with the values that need the most memory of shared pools and data."""
    for key in SIZE_KEYS.keys() & config.search.keys():
        section, name = key.split(".")
        value = SIZE_KEYS[key](config.search[key].values_to_check)
        # without validation: these values need not be valid together
        section_config = getattr(ppo_config, section).model_copy(update={name: value})
        ppo_config = ppo_config.model_copy(update={section: section_config})
    return ppo_config


def num_concurrent_trials(config: TuneStageConfig) -> int:
    """Return the number of trials to run at a time. Raises ConfigError if too few fit."""
    ppo_config, tune = config.base_config, config.tune
    roles = {pool.role: pool.config for pool in build_role_pools(ppo_config, 1)}
    present, addable = cluster_nodes()
    data_cpus = ppo_config.cluster.data_cpus
    check_demands(pool_demands(roles), present, addable, data_cpus=data_cpus)
    shared: dict[str, RoleConfig] = {}
    if tune.shared_pools:
        shared = {name: config for name, config in roles.items() if name in SHARED_ROLES}
    trial = {name: config for name, config in roles.items() if name not in shared}
    num_trials = tune.num_trials if tune.searcher == "tpe" else len(list_trial_params(config))
    max_trials = max(
        max_concurrent_trials(trial, shared, nodes, data_cpus=data_cpus, limit=num_trials)
        for nodes in (present, addable)
    )
    if tune.scheduler == "pbt" and max_trials < num_trials:
        raise ConfigError(
            "tune.scheduler=pbt needs all trials at the same time, and the cluster has room for "
            f"{max_trials} of tune.num_trials={num_trials}; lower it or the resources of the "
            "pools in the base config, or use a larger cluster"
        )
    return min(max(max_trials, 1), tune.max_concurrent or num_trials)


def prepare_base(base: Run, config: TuneStageConfig, reporter: ConsoleReporter) -> None:
    """Prepare the prompts of all trials. Raises ConfigError if there are too few."""
    largest = largest_config(config, config.base_config)
    plan, ppo = prepare_prompts(base, largest, reporter), largest.ppo
    if plan.num_steps != ppo.max_iterations:
        raise ConfigError(
            f"base: ppo.max_iterations={ppo.max_iterations}: the prompts suffice only for "
            f"{plan.num_steps} iterations of {ppo.rollout_batch_size}; raise ppo.prompt_epochs or "
            "lower ppo.max_iterations"
        )

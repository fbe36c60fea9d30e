"""Configuration of `medgpt tune`: a search over keys of the PPO stage."""

import json
import math
from collections.abc import Mapping
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, Gt, Le, Len
from pydantic import BeforeValidator, model_validator

from medgpt.config.base import Config, ConfigError, Count, DataPath
from medgpt.config.loading import load, with_values
from medgpt.config.pools import ROLES, RoleName
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.search_space import SearchSpace, flatten_spaces
from medgpt.config.stages import RunConfig

Params = dict[str, Any]  # values of a trial, by searched key
SHARED_ROLES: tuple[RoleName, ...] = ("reward", "reference")  # all trials can share their pools
MAX_COMBINATIONS = 1000  # to validate together

NOT_SEARCHABLE = {  # keys of the PPO stage that cannot be searched, and why
    "run": "every trial has its own run; check.seeds compares seeds",
    "model.name": "all trials start from the same model",
    "data": "all trials train on the same prompts",
    "ptx.data": "all trials train on the same rows",
    "judge": "results of different judges cannot be compared",
    "pools": "it decides how many trials fit, not what they learn",
    "cluster": "all trials run on the same cluster",
    "report": "it does not change the results",
    "ppo.max_iterations": "it sets the length of every trial",
    "ppo.prompt_epochs": "it sets the length of every trial",
    "ppo.checkpoint_every": "trials write a checkpoint whenever they are judged",
    "ppo.keep_checkpoints": "it does not change the results",
    "ppo.log_every": "it does not change the results",
}
SHARED_POOL_KEYS = {  # keys that decide the contents of a shared pool
    "reward": "reward",
    "model.attention": "reference",
    "model.trust_remote_code": "reference",
}
NOT_COPYABLE = {  # keys with which a copied state does not fit
    "model": "the policy",
    "critic.model": "the critic",
    "critic.lora": "the critic",
}


ROWS_PER_ITERATION_KEYS = (
    "ppo.epochs",
    "ppo.global_batch_size",
    "ppo.rollout_batch_size",
    "ptx.batch_size",
)
"""Keys that decide how many rows of [ptx] an iteration needs."""


class TuneConfig(Config):
    num_trials: Count = 8
    """Number of trials; searcher=grid has one for each combination."""
    searcher: Literal["random", "grid", "tpe"] = "random"
    """Source of the values of a trial. tpe: Optuna, which learns from earlier trials."""
    scheduler: Literal["none", "asha", "pbt"] = "asha"
    """asha: stop trials that fall behind (arXiv 1810.05934). pbt: a trial that falls behind copies
    the state of a better one and continues with values near its (arXiv 1711.09846)."""
    default_first: bool = True
    """Trial 1 has the values of the base config."""
    metric: Literal["checks", "score"] = "checks"
    """Judge metric to maximize: its checks, or the score of its reward model."""
    max_kl: Annotated[float, Gt(0)] = 20.0
    """Maximum KL from the reference in nats per answer; trials above it rank below all others."""
    max_concurrent: Count | None = None
    """Maximum number of concurrent trials; unset: as many as the cluster has room for."""
    grace_judgements: Count = 1
    """asha: number of judge evaluations before a trial may be stopped."""
    reduction_factor: Annotated[float, Gt(1)] = 3.0
    """asha: one of this many trials continues."""
    perturb_judgements: Count = 1
    """pbt: judge evaluations between decisions whether to copy another trial."""
    shared_pools: bool = True
    """Share one reward and one reference pool among all trials; false gives each trial its own."""
    max_failures: Annotated[int, Ge(0)] = 2
    """Maximum number of times that a trial is restarted from its checkpoint after it died."""


class CheckConfig(Config):
    """Compare the winner with the base config on questions that no trial was judged by."""

    seeds: Annotated[int, Ge(0)] = 3
    """Number of seeds to sample answers with; 0 skips the check."""
    retrain: bool = False
    """Train both again with each of the seeds, and compare those models."""
    share: Annotated[float, Gt(0), Le(0.9)] = 0.5
    """Share of the judge's questions that is reserved for the check."""


class TuneStageConfig(Config):
    """Root config of the tuning stage, as in configs/tune.toml."""

    run: RunConfig
    base: DataPath
    """TOML file of `medgpt ppo`: the config that all trials start from."""
    overrides: tuple[str, ...] = ()
    """`section.key=value` assignments on top of the base config."""
    search: Annotated[dict[str, SearchSpace], Len(1), BeforeValidator(flatten_spaces)]
    tune: TuneConfig = TuneConfig()
    check: CheckConfig = CheckConfig()

    @cached_property
    def base_config(self) -> PPOStageConfig:
        """The PPO config that all trials start from. Raises ConfigError."""
        own = f"run.dir={json.dumps(f'{self.run.dir}/base', ensure_ascii=False)}"
        try:
            return load(PPOStageConfig, Path(self.base), [*self.overrides, own])
        except ConfigError as error:
            raise ConfigError(f"base={self.base}: {error}") from None

    @cached_property
    def base_values(self) -> Params:
        """The base config's values of the searched keys."""
        return {key: value_at(self.base_config, key) for key in self.search}

    @model_validator(mode="after")
    def _check_judge(self) -> Self:
        ppo, judge, tune = self.base_config.ppo, self.base_config.judge, self.tune
        if not judge.every:
            raise ValueError(
                "base: judge.every=0: trials are compared by the judge; set judge.every there"
            )
        if ppo.max_iterations is None or ppo.max_iterations % judge.every:
            raise ValueError(
                f"base: ppo.max_iterations={ppo.max_iterations} must be a multiple of judge.every="
                f"{judge.every}, so that the end of a trial is judged"
            )
        if tune.metric == "score" and judge.model is None:
            raise ValueError(
                "tune.metric=score needs the judge's own reward model; set judge.model in the "
                "base, or tune.metric=checks"
            )
        return self

    @model_validator(mode="after")
    def _check_search(self) -> Self:
        for key, space in self.search.items():
            if reason := self._why_not(key, space):
                raise ValueError(f'search."{key}" {reason}')
        return self

    def _why_not(self, key: str, space: SearchSpace) -> str | None:
        """Return the reason why the key cannot be searched in this space, or None."""
        tune = self.tune
        if self.base_config.ptx is not None and key in ROWS_PER_ITERATION_KEYS:
            return (
                "cannot be searched: it changes how many rows of [ptx] an iteration of the base "
                "config needs; leave it out"
            )
        if reason := _reason_for(key, NOT_SEARCHABLE):
            return f"cannot be searched: {reason}"
        if tune.shared_pools and (pool := _reason_for(key, SHARED_POOL_KEYS)):
            return (
                f"would change the {pool} pool, which all trials share; leave it out, or set "
                "tune.shared_pools=false"
            )
        if tune.scheduler == "pbt" and (part := _reason_for(key, NOT_COPYABLE)):
            return (
                f"makes {part} another model, and tune.scheduler=pbt copies weights between "
                "trials; leave it out, or use asha"
            )
        if tune.searcher == "grid" and space.values is None:
            return (
                "needs a list of values for tune.searcher=grid; write them as { grid = [...] }, "
                "or set tune.searcher=random"
            )
        if tune.searcher != "grid" and space.grid is not None:
            return "has a grid, which needs tune.searcher=grid; set it, or write choice"
        return None

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        for key, space in self.search.items():
            for value in space.values_to_check:
                self._trial_config({key: value})
        choices = [space.values_to_check for space in self.search.values()]
        if math.prod(map(len, choices)) <= MAX_COMBINATIONS:
            for values in product(*choices):
                self._trial_config(dict(zip(self.search, values, strict=True)))
        return self

    @model_validator(mode="after")
    def _check_searcher(self) -> Self:
        tune = self.tune
        if tune.default_first and tune.searcher == "tpe":
            for key, space in self.search.items():
                if self.base_values[key] not in space:
                    raise ValueError(
                        f'search."{key}" does not contain {self.base_values[key]}, the value of '
                        "the base config for trial 1; widen it, or set tune.default_first=false"
                    )
        if tune.scheduler == "pbt" and tune.searcher != "random":
            raise ValueError(
                f"tune.scheduler=pbt changes values itself and starts with random ones; "
                f"use tune.searcher={tune.searcher} with asha or none"
            )
        return self

    @model_validator(mode="after")
    def _check_shared_pools(self) -> Self:
        if not self.tune.shared_pools:
            return self
        for name in ROLES:
            host = self.base_config.pools.role(name).share_with
            if host is not None and (name in SHARED_ROLES) != (host in SHARED_ROLES):
                raise ValueError(
                    f"base: pools.{name}.share_with={host}: all trials share one of them, but each "
                    "has its own of the other; unset it, or set tune.shared_pools=false"
                )
        return self

    @model_validator(mode="after")
    def _make_paths_absolute(self) -> Self:
        """Make paths among the values absolute, because trials run in other folders."""
        changed = dict(self.search)
        for key, space in self.search.items():
            if space.values is not None:
                configs = [self._trial_config({key: value}) for value in space.values]
                values = tuple(value_at(config, key) for config in configs)
                changed[key] = SearchSpace(**{"grid" if space.grid else "choice": values})
        return self.model_copy(update={"search": changed})

    def _trial_config(self, values: Params) -> PPOStageConfig:
        """Return the config of a trial. Raises ConfigError if these values are not valid."""
        try:
            return with_values(PPOStageConfig, self.base_config, values)
        except ConfigError as error:
            assignments = ", ".join(f"{key}={value}" for key, value in values.items())
            prefix = f"with {assignments}: " if len(values) > 1 else ""
            raise ConfigError(f"search: {prefix}{error}") from None


def _reason_for(key: str, reasons: Mapping[str, str]) -> str | None:
    """Return the reason for the key or for a section that contains it, or None."""
    matches = (why for known, why in reasons.items() if f"{key}.".startswith(f"{known}."))
    return next(matches, None)


def value_at(config: Any, key: str) -> Any:
    """Return the value of `section.key`."""
    for name in key.split("."):
        if isinstance(config, tuple):
            config = config[int(name)]
        elif isinstance(config, dict):
            config = config.get(name)
        else:
            config = getattr(config, name)
    return config

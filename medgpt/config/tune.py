"""A search over PPO's keys: which values, in what order, and what counts as better."""

import json
import math
from collections.abc import Iterator, Mapping
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
from medgpt.config.stages import RunConfig

Value = bool | int | float | str
Params = dict[str, Any]  # searched keys with a trial's values
SPACE_KINDS = ("uniform", "loguniform", "randint", "choice", "grid")
SHARED_ROLES: tuple[RoleName, ...] = ("reward", "reference")  # pools that all trials can share
MAX_COMBINATIONS = 1000  # of values that are checked together
INNER_POINT = 0.381966  # of a range: no whole number there, whatever its ends

NOT_SEARCHABLE = {  # keys of the PPO stage that are not searched, and why
    "run": "every trial has a run of its own; seeds are compared by check.seeds",
    "model.name": "all trials start from the same model",
    "data": "all trials learn from the same prompts",
    "ptx.data": "all trials learn from the same rows",
    "judge": "marks of different judges cannot be compared",
    "pools": "it decides how many trials have room, not what they learn",
    "cluster": "all trials run on the same cluster",
    "report": "it changes no trial",
    "ppo.max_iterations": "it is the length of every trial",
    "ppo.prompt_epochs": "it is the length of every trial",
    "ppo.checkpoint_every": "trials are saved when they are judged",
    "ppo.keep_checkpoints": "it changes no trial",
    "ppo.log_every": "it changes no trial",
}
SHARED_POOL_KEYS = {  # what a pool that all trials share is made from
    "reward": "reward",
    "model.attention": "reference",
    "model.trust_remote_code": "reference",
}
NOT_COPYABLE = {  # a copied state would not fit
    "model": "the policy",
    "critic.model": "the critic",
    "critic.lora": "the critic",
}


class SearchSpace(Config):
    """What one key may be: a table with one of these. The key is in quotes:
    `"ppo.kl_coef" = { loguniform = [1e-3, 0.3] }`."""

    uniform: tuple[float, float] | None = None
    """Any number between the two."""
    loguniform: tuple[Annotated[float, Gt(0)], Annotated[float, Gt(0)]] | None = None
    """Any number between the two, every order of magnitude as likely."""
    randint: tuple[int, int] | None = None
    """Any integer from the first to the last."""
    choice: Annotated[tuple[Value, ...], Len(1)] | None = None
    """One of these."""
    grid: Annotated[tuple[Value, ...], Len(1)] | None = None
    """All of these, with all of the other keys; needs tune.searcher=grid."""

    @model_validator(mode="after")
    def _check_one_kind(self) -> Self:
        given = [kind for kind in SPACE_KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            has = " and ".join(given) or "none"  # of the file and of an override together
            raise ValueError(
                f"has {has}; needs one of {', '.join(SPACE_KINDS)}, as {{ choice = [1] }}"
            )
        if self.bounds is not None and self.bounds[0] >= self.bounds[1]:
            raise ValueError(f"{given[0]} needs the lower end first, as [0.1, 1.0]")
        return self

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The ends of a range."""
        return self.uniform or self.loguniform or self.randint

    @property
    def values(self) -> tuple[Value, ...] | None:
        """All values, if they are listed."""
        return self.choice or self.grid

    @property
    def values_to_check(self) -> tuple[Value, ...]:
        """Values that must be right for all to be: the ends of a range and one between them."""
        if self.values is not None:
            return self.values
        assert self.bounds is not None
        low, high = self.bounds
        return self.bounds if self.randint else (low, high, low + INNER_POINT * (high - low))

    def __contains__(self, value: object) -> bool:
        if self.values is not None:
            return value in self.values
        assert self.bounds is not None
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return self.bounds[0] <= value <= self.bounds[1]

    def clip(self, value: Any) -> Any:
        """`value`, or the end of the range that it lies beyond."""
        if self.bounds is None:
            return value
        return type(value)(min(max(value, self.bounds[0]), self.bounds[1]))


def flatten_spaces(tree: object) -> object:
    """Tables of tables as `ppo.kl_coef = {...}` writes them, under keys with dots."""
    if not isinstance(tree, dict):
        return tree

    def leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
        is_table = (
            isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values())
        )
        if is_table and not value.keys() & set(SPACE_KINDS):
            for name, inner in value.items():
                yield from leaves(f"{path}.{name}", inner)
        else:
            yield path, value

    return {name: space for key, value in tree.items() for name, space in leaves(key, value)}


ROWS_PER_ITERATION_KEYS = (
    "ppo.epochs",
    "ppo.global_batch_size",
    "ppo.rollout_batch_size",
    "ptx.batch_size",
)
"""Keys that decide how many rows of [ptx] an iteration takes."""


class TuneConfig(Config):
    num_trials: Count = 8
    """Trials in all; searcher=grid has as many as there are combinations."""
    searcher: Literal["random", "grid", "tpe"] = "random"
    """Where a trial's values come from. tpe: Optuna's, which learns from the trials before."""
    scheduler: Literal["none", "asha", "pbt"] = "asha"
    """asha: stop what is behind (arXiv 1810.05934). pbt: what is behind copies the state of a
    better trial and goes on with values near its (arXiv 1711.09846)."""
    default_first: bool = True
    """Trial 1 has the base's own values."""
    mark: Literal["checks", "score"] = "checks"
    """The judge's mark that is to be high: its checks, or its reward model's score."""
    max_kl: Annotated[float, Gt(0)] = 20.0
    """Nats per answer from the reference. A trial beyond is worse than any that is not."""
    max_concurrent: Count | None = None
    """Trials at the same time; unset: as many as the cluster has room for."""
    grace_judgements: Count = 1
    """asha: no trial is stopped before it was judged so often."""
    reduction_factor: Annotated[float, Gt(1)] = 3.0
    """asha: of so many trials one goes on."""
    perturb_judgements: Count = 1
    """pbt: judgements between looks whether to copy another trial."""
    shared_pools: bool = True
    """One reward and one reference pool for all trials; false gives each trial its own."""
    max_failures: Annotated[int, Ge(0)] = 2
    """Times that a trial which died goes on from its checkpoint."""


class CheckConfig(Config):
    """The winner against the base's own values, by questions that no trial was judged by."""

    seeds: Annotated[int, Ge(0)] = 3
    """Answers are sampled with so many seeds; 0 leaves the check out."""
    retrain: bool = False
    """Train both again with each of the seeds, and check those."""
    share: Annotated[float, Gt(0), Le(0.9)] = 0.5
    """Of the judge's questions that are kept for it."""


class TuneStageConfig(Config):
    """configs/tune.toml"""

    run: RunConfig
    base: DataPath
    """TOML file of `medgpt ppo`: what all trials have in common."""
    overrides: tuple[str, ...] = ()
    """`section.key=value` assignments on top of it."""
    search: Annotated[dict[str, SearchSpace], Len(1), BeforeValidator(flatten_spaces)]
    tune: TuneConfig = TuneConfig()
    check: CheckConfig = CheckConfig()

    @cached_property
    def base_config(self) -> PPOStageConfig:
        """What all trials have in common. Raises ConfigError."""
        own = f"run.dir={json.dumps(f'{self.run.dir}/base', ensure_ascii=False)}"
        try:
            return load(PPOStageConfig, Path(self.base), [*self.overrides, own])
        except ConfigError as error:
            raise ConfigError(f"base={self.base}: {error}") from None

    @cached_property
    def base_values(self) -> Params:
        """The base's values of the searched keys."""
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
                f"{judge.every}, so that a trial's end is judged"
            )
        if tune.mark == "score" and judge.model is None:
            raise ValueError(
                "tune.mark=score needs a reward model of the judge's own; set judge.model in the "
                "base, or tune.mark=checks"
            )
        return self

    @model_validator(mode="after")
    def _check_keys(self) -> Self:
        for key in self.search:
            if self.base_config.ptx is not None and key in ROWS_PER_ITERATION_KEYS:
                raise ValueError(
                    f'search."{key}" cannot be searched: the base has [ptx], whose rows are dealt '
                    "to the steps of an iteration, and it changes how many; leave it out"
                )
            if reason := _reason_for(key, NOT_SEARCHABLE):
                raise ValueError(f'search."{key}" cannot be searched: {reason}')
            if self.tune.shared_pools and (pool := _reason_for(key, SHARED_POOL_KEYS)):
                raise ValueError(
                    f'search."{key}" would change the {pool} pool, which all trials share; leave '
                    "it out, or give each trial its own by tune.shared_pools=false"
                )
            if self.tune.scheduler == "pbt" and (part := _reason_for(key, NOT_COPYABLE)):
                raise ValueError(
                    f'search."{key}" makes {part} another model, and tune.scheduler=pbt copies '
                    "weights between trials; leave it out, or take asha"
                )
        return self

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
        for key, space in self.search.items():
            if tune.searcher == "grid" and space.values is None:
                raise ValueError(
                    f'search."{key}": tune.searcher=grid tries all values, and a range has no end '
                    "of them; list some as { grid = [...] }, or take random"
                )
            if tune.searcher != "grid" and space.grid is not None:
                raise ValueError(
                    f'search."{key}": grid goes with tune.searcher=grid; write choice, or set that'
                )
            if tune.default_first and tune.searcher == "tpe" and self.base_values[key] not in space:
                raise ValueError(
                    f'search."{key}" does not contain {self.base_values[key]}, the base\'s own '
                    "value, which is to be trial 1; widen it, or set tune.default_first=false"
                )
        if tune.scheduler == "pbt" and tune.searcher != "random":
            raise ValueError(
                f"tune.scheduler=pbt changes values by itself and begins with random ones; "
                f"tune.searcher={tune.searcher} goes with asha or none"
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
                    f"base: pools.{name}.share_with={host}: one of them is shared by all trials, "
                    "the other is each trial's; unset it, or set tune.shared_pools=false"
                )
        return self

    @model_validator(mode="after")
    def _make_paths_absolute(self) -> Self:
        """Trials run in other folders."""
        listed = {
            key: [value_at(self._trial_config({key: value}), key) for value in space.values]
            for key, space in self.search.items()
            if space.values is not None
        }
        changed = {
            key: SearchSpace(**{"grid" if self.search[key].grid else "choice": tuple(values)})
            for key, values in listed.items()
        }
        return self.model_copy(update={"search": {**self.search, **changed}})

    def _trial_config(self, values: Params) -> PPOStageConfig:
        """A trial's config. Raises ConfigError if it cannot have these."""
        try:
            return with_values(PPOStageConfig, self.base_config, values)
        except ConfigError as error:
            assignments = ", ".join(f"{key}={value}" for key, value in values.items())
            prefix = f"with {assignments}: " if len(values) > 1 else ""
            raise ConfigError(f"search: {prefix}{error}") from None


def _reason_for(key: str, reasons: Mapping[str, str]) -> str | None:
    """Of the key, or of a section that it is in."""
    matches = (why for known, why in reasons.items() if f"{key}.".startswith(f"{known}."))
    return next(matches, None)


def value_at(config: Any, key: str) -> Any:
    """What `section.key` is."""
    for name in key.split("."):
        if isinstance(config, tuple):
            config = config[int(name)]
        elif isinstance(config, dict):
            config = config.get(name)
        else:
            config = getattr(config, name)
    return config

"""The search: Ray Tune proposes values, starts trials and decides which of them continue."""

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import optuna
import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search import ConcurrencyLimiter, Searcher
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch

from medgpt.artifacts import Folder
from medgpt.cluster.placement_groups import is_actor_dead, release_orphaned_groups
from medgpt.cluster.ray_storage import storage_settings
from medgpt.config.search_space import SearchSpace
from medgpt.config.tune import Params, TuneStageConfig
from medgpt.tune.objective import OVER_KL_LIMIT, WORST_OBJECTIVE
from medgpt.tune.space import list_trial_params
from medgpt.tune.trial import ITERATION, OBJECTIVE, TrialProcess, TrialSetup, run_trial
from medgpt.tune.trial_records import TrialRecords, trial_name

TRIAL_MEMORY_BYTES = 512 * 2**20  # memory that Ray reserves for the process of a trial
RELEASE_EVERY_S = 2.0
TRIAL_END_TIMEOUT_S = 10.0  # time for the processes of trials to end after the search
RAY_TUNE_ENV = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the run directory of a trial has all of it
    "TUNE_GLOBAL_CHECKPOINT_S": str(10**6),  # never read, see trial_records.py
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the command; repeating it resumes
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
Say = Callable[[str], None]


def run_search(
    config: TuneStageConfig, setup: TrialSetup, *, max_concurrent: int, say: Say
) -> None:
    """Run all trials of the search to their ends, and write the outcome to their records."""
    records = TrialRecords(setup.trials_url)
    param_space, searcher = _param_space_and_searcher(config, records, max_concurrent)
    random.seed(config.run.seed)  # for PBT of Ray Tune
    np.random.seed(config.run.seed)
    _fit(setup, param_space, searcher, _scheduler(config, setup), say)


def run_named_trials(
    trials: Mapping[str, Params], setup: TrialSetup, *, max_concurrent: int, say: Say
) -> None:
    """Run these trials to their ends, without comparing them."""
    _fit(setup, *_grid(trials, max_concurrent), None, say)


def _fit(
    setup: TrialSetup, param_space: dict[str, Any], searcher: Any, scheduler: Any, say: Say
) -> None:
    os.environ.update(RAY_TUNE_ENV)
    folder = Folder(f"{setup.trials_url}-tune")
    folder.remove()  # left by a killed search
    trainable = tune.with_resources(
        tune.with_parameters(partial(run_trial, process=TrialProcess()), setup=setup),
        # pools and data tasks reserve their own resources
        tune.PlacementGroupFactory([{"memory": TRIAL_MEMORY_BYTES}]),
    )
    tuner = tune.Tuner(
        trainable,
        param_space=param_space,
        tune_config=tune.TuneConfig(
            metric=OBJECTIVE,
            mode="max",
            search_alg=searcher,
            scheduler=scheduler,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            **storage_settings(folder),
            failure_config=tune.FailureConfig(max_failures=setup.config.max_failures),
            callbacks=[TrialProgress(TrialRecords(setup.trials_url), setup.num_iterations, say)],
            verbose=0,
        ),
    )
    creators = release_orphaned_groups(is_actor_dead)  # of other searches, and of shared pools
    try:
        tuner.fit()
    finally:
        _release_groups_of_trials(creators)
    folder.remove()


def _release_groups_of_trials(other_creators: set[str]) -> None:
    """Release the resources of this job's trials, whose processes die soon after the search."""
    job_id = ray.get_runtime_context().get_job_id()  # the id of an actor ends with it
    deadline = time.monotonic() + TRIAL_END_TIMEOUT_S
    while time.monotonic() < deadline:
        remaining = release_orphaned_groups(is_actor_dead) - other_creators
        if not any(creator.endswith(job_id) for creator in remaining):
            return
        time.sleep(0.1)


class TrialProgress(tune.Callback):
    """Prints the progress of trials, and records how Ray Tune ended them."""

    def __init__(self, records: TrialRecords, num_iterations: int, say: Say) -> None:
        self.records, self.num_iterations, self.say = records, num_iterations, say
        self.last_release = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray Tune pickles callbacks into its own record

    def on_step_end(self, iteration: int, trials: list[Trial], **_: Any) -> None:
        """Release the resources of trials whose processes have died."""
        if time.monotonic() > self.last_release + RELEASE_EVERY_S:
            release_orphaned_groups(is_actor_dead)
            self.last_release = time.monotonic()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        position = f"trial {trial} iteration {result[ITERATION]}/{self.num_iterations}"
        if result[OBJECTIVE] <= WORST_OBJECTIVE:
            self.say(f"{position}  no usable policy")
            return
        over_limit = "  above tune.max_kl" if result[OBJECTIVE] <= OVER_KL_LIMIT else ""
        self.say(
            f"{position}  {result['metric']:.3f} ± {result['metric_se']:.3f}  "
            f"kl {result['kl']:.2f}{over_limit}"
        )

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **_: Any
    ) -> None:
        self.records.end_if_running(str(trial), "stopped", "behind other trials")
        record = self.records.read(str(trial))
        assert record is not None
        self.say(f"trial {trial} {record.status}{f': {record.why}' if record.why else ''}")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        error = trial.get_error()
        why = str(error).strip().splitlines()[-1] if error else "died"
        self.records.end_if_running(str(trial), "failed", why)
        self.say(f"trial {trial} failed: {why}")


class NamedOptunaSearch(OptunaSearch):
    """Proposes values by Optuna, for trials that have the next of some names."""

    def __init__(self, space: dict[str, Any], names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(self.convert_search_space(space), metric=OBJECTIVE, mode="max", **kwargs)
        self._names = list(reversed(names))

    def suggest(self, trial_id: str) -> Any:
        if not self._names:
            return Searcher.FINISHED
        return {"trial": {"name": self._names.pop(), "params": super().suggest(trial_id)}}


def _param_space_and_searcher(
    config: TuneStageConfig, records: TrialRecords, max_concurrent: int
) -> tuple[dict[str, Any], Any]:
    """Return Ray Tune's parameter space and searcher. Recorded trials come first, unchanged."""
    recorded = {record.name: record.params for record in records.all()}
    if config.tune.searcher != "tpe":
        trials = {trial_name(n): params for n, params in enumerate(list_trial_params(config), 1)}
        # PBT needs all trials at the same time to compare them
        limit = 0 if config.tune.scheduler == "pbt" else max_concurrent
        return _grid(trials | recorded, limit)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    first = [config.base_values] if config.tune.default_first and not recorded else []
    searcher = NamedOptunaSearch(
        {key: _ray_domain(space) for key, space in config.search.items()},
        list(dict.fromkeys([*recorded, *map(trial_name, range(1, config.tune.num_trials + 1))])),
        points_to_evaluate=[*recorded.values(), *first],
        seed=config.run.seed,
    )
    return {}, ConcurrencyLimiter(searcher, max_concurrent=max_concurrent)


def _grid(trials: Mapping[str, Params], max_concurrent: int) -> tuple[dict[str, Any], Any]:
    """Return Ray Tune's parameter space and searcher of these trials by name."""
    space = [{"name": name, "params": params} for name, params in trials.items()]
    return {"trial": tune.grid_search(space)}, BasicVariantGenerator(max_concurrent=max_concurrent)


def _trial_name(trial: Trial) -> str:
    """Return the name chosen at the start, which a trial keeps when PBT changes its values."""
    return trial.config["trial"]["name"]


def _scheduler(config: TuneStageConfig, setup: TrialSetup) -> TrialScheduler | None:
    settings, every = config.tune, setup.ppo_config.judge.every
    if settings.scheduler == "asha":
        return ASHAScheduler(
            time_attr=ITERATION,
            max_t=setup.num_iterations,
            grace_period=min(settings.grace_judgements * every, setup.num_iterations),
            reduction_factor=settings.reduction_factor,
        )
    if settings.scheduler == "pbt":
        mutations = {  # PBT steps to the neighbors in a list
            key: list(space.values) if space.values else _ray_domain(space)
            for key, space in config.search.items()
        }
        return PopulationBasedTraining(
            time_attr=ITERATION,
            perturbation_interval=settings.perturb_judgements * every,
            hyperparam_mutations={"trial": {"params": mutations}},
            custom_explore_fn=partial(_clip_to_ranges, config.search),
            log_config=False,
        )
    return None


def _ray_domain(space: SearchSpace) -> Any:
    """Convert a search space for Ray Tune."""
    if space.uniform is not None:
        return tune.uniform(*space.uniform)
    if space.loguniform is not None:
        return tune.loguniform(*space.loguniform)
    if space.randint is not None:
        return tune.randint(space.randint[0], space.randint[1] + 1)
    assert space.values is not None
    return tune.choice(list(space.values))


def _clip_to_ranges(search: Mapping[str, SearchSpace], config: dict[str, Any]) -> dict[str, Any]:
    """Clip the values that PBT has multiplied to their ranges."""
    params = config["trial"]["params"]
    clipped = {key: space.clip(params[key]) for key, space in search.items()}
    return {**config, "trial": {**config["trial"], "params": clipped}}

"""One trial: PPO with values that the search has chosen, in a process that Ray Tune started.

A trial has a run directory like any PPO run and resumes like one. It reports judge results to Ray
Tune, which decides whether it continues. Its process and its pools are reused by the next trial.
"""

import json
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import tune

from medgpt.config.base import ConfigError
from medgpt.config.loading import with_values
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.tune import Params, TuneConfig
from medgpt.data.loader.plan import Plan
from medgpt.metrics import ConsoleReporter
from medgpt.rlhf.diagnosis import Diverged
from medgpt.rlhf.setup import build_ppo, build_role_pools, export_models
from medgpt.runs import Run
from medgpt.tune.objective import WORST_OBJECTIVE, JudgeResult, judge_results, objective
from medgpt.tune.pbt_copy import copy_trial_state
from medgpt.tune.shared_pools import SharedPools
from medgpt.tune.trial_records import Status, TrialRecord, TrialRecords

if TYPE_CHECKING:
    from medgpt.tune.trial_pools import TrialPools

ITERATION, OBJECTIVE = "iteration", "objective"  # metrics for Ray Tune
POINTER_FILE = "pointer.json"
# manifest keys that a trial takes over from the base run
BASE_MANIFEST_KEYS = ("seed", "parents", "data", "plan", "ptx", "hardware")


@dataclass(frozen=True, kw_only=True)
class TrialSetup:
    """What all trials of a search have in common."""

    ppo_config: PPOStageConfig
    """The config of all trials, without the values that are searched."""
    config: TuneConfig
    trials_url: str
    """Folder with the run directories of all trials."""
    base_url: str
    """Run directory that holds the prompts and their order."""
    shared_pools: SharedPools | None
    """Pools that all trials share; None if every trial has its own."""

    @property
    def num_iterations(self) -> int:
        assert self.ppo_config.ppo.max_iterations is not None
        return self.ppo_config.ppo.max_iterations

    @property
    def copies_states(self) -> bool:
        """Whether trials copy the states of other trials."""
        return self.config.scheduler == "pbt"


@dataclass
class TrialProcess:
    """What a process that Ray Tune reuses keeps from one trial to the next."""

    pools: "TrialPools | None" = None


def run_trial(config: dict[str, Any], setup: TrialSetup, process: TrialProcess) -> None:
    """Run a trial. Ray Tune calls this to start it, and again after its death or new values."""
    name = tune.get_context().get_trial_name()
    PPOTrial(setup, process, name, config["trial"]["params"]).run()


class PPOTrial:
    """Trains from the newest checkpoint to the end, or until Ray Tune stops it by SystemExit."""

    def __init__(self, setup: TrialSetup, process: TrialProcess, name: str, params: Params) -> None:
        self.setup, self.process, self.name = setup, process, name
        self.records = TrialRecords(setup.trials_url)
        self.record = self.records.read(name) or TrialRecord(name, params)
        self.new_params = params
        self.ppo_run = self.records.run(name)
        self.last_reported_iteration = 0
        """Iteration of the last judge result that Ray Tune knows; the one at 0 is not reported."""

    def run(self) -> None:
        if self.record.is_done:
            self._report_again()
            self._report(*self._final_result(), done=True)
            return
        self.record = self.records.write(replace(self.record, status="running", why=""))
        pointer = self._read_pointer()
        if pointer is not None:
            self.record = copy_trial_state(self.records, self.record, self.new_params, pointer)
        try:
            own_values = {"run.dir": self.ppo_run.folder.url, "run.allow_changes": True}
            values = {**self.record.params, **own_values}
            config = with_values(PPOStageConfig, self.setup.ppo_config, values)
            self._open_run(config)
        except ConfigError as error:
            self._end("refused", str(error))
            return
        self._report_again()
        self._train(config)

    def _train(self, config: PPOStageConfig) -> None:
        from medgpt.tune.trial_pools import reuse_or_start  # needs torch

        reporter = ConsoleReporter(f"trial {self.name}")
        kept, self.process.pools = self.process.pools, None
        role_pools = build_role_pools(config, self.setup.num_iterations)
        shared = self.setup.shared_pools
        pools = reuse_or_start(kept, role_pools, config, shared, say=reporter.say)
        try:
            self._iterate(config, pools, reporter)
        except (Diverged, SystemExit) as end:  # no call to a pool is pending
            self.process.pools = pools
            if isinstance(end, SystemExit):
                raise
            self._end("diverged", str(end))
        except BaseException:
            pools.close()
            raise
        else:
            self.process.pools = pools
        finally:
            reporter.close()

    def _iterate(
        self, config: PPOStageConfig, pools: "TrialPools", reporter: ConsoleReporter
    ) -> None:
        base = Run(self.setup.base_url)
        plan = Plan(
            base.plan.url,
            global_batch_size=config.ppo.rollout_batch_size,
            max_steps=self.setup.num_iterations,
        )
        on_eval = partial(self._on_judged, config, pools)
        ppo = build_ppo(
            self.ppo_run, config, pools, reporter, plan=plan, prepared_run=base, on_eval=on_eval
        )
        ppo.fit()

    def _on_judged(self, config: PPOStageConfig, pools: "TrialPools", history: Any) -> None:
        """Report a judge result to Ray Tune, which may stop the trial here."""
        result = judge_results(history, self.setup.config)[-1]
        if result.iteration < self.setup.num_iterations:
            self._report(result, objective(result, self.setup.config))
            return
        export_models(self.ppo_run, config, pools, critic=False)
        self.ppo_run.update_manifest(finished=True)
        self._end("finished", "")

    def _open_run(self, config: PPOStageConfig) -> None:
        """Open the run directory, and copy the facts about the prompts to its manifest."""
        self.ppo_run = Run.open("ppo", config, run_dir=config.run.dir, allow_changes=True)
        manifest = Run(self.setup.base_url).manifest
        facts = {name: manifest[name] for name in BASE_MANIFEST_KEYS if name in manifest}
        self.ppo_run.update_manifest(**facts)

    def _report_again(self) -> None:
        """Report again what Ray Tune knew before a death or a kill, for its decisions on other
        trials: all but the newest judge result, which follows when training continues or ends."""
        if self.setup.copies_states:
            return
        checkpoint = self.ppo_run.newest_checkpoint()
        iteration = checkpoint[1]["state"]["iteration"] if checkpoint else 0
        for result in judge_results(self.ppo_run.metrics(), self.setup.config):
            if result.iteration < iteration:
                self._report(result, objective(result, self.setup.config))

    def _final_result(self) -> tuple[JudgeResult, float]:
        """Return the last judge result and the objective; the worst one without a useful policy."""
        metrics = self.ppo_run.metrics()
        results = judge_results(metrics, self.setup.config) or [JudgeResult(0, 0.0, 0.0, 0.0)]
        if self.record.status in ("diverged", "refused"):
            num_steps = metrics[-1]["step"] if metrics else 1
            return results[-1]._replace(iteration=num_steps), WORST_OBJECTIVE
        return results[-1], objective(results[-1], self.setup.config)

    def _end(self, status: Status, why: str) -> None:
        """Write the record first: Ray Tune does not return from a last report."""
        self.record = self.records.write(replace(self.record, status=status, why=why))
        self._report(*self._final_result(), done=True)

    def _report(self, result: JudgeResult, objective_value: float, *, done: bool = False) -> None:
        if not done and result.iteration <= self.last_reported_iteration:
            return
        self.last_reported_iteration = result.iteration
        metrics = {
            ITERATION: result.iteration,
            OBJECTIVE: objective_value,
            "done": done,
            **result._asdict(),
        }
        if not self.setup.copies_states:
            tune.report(metrics)
            return
        with tempfile.TemporaryDirectory(prefix="medgpt-") as folder:
            pointer = {"trial": self.name, "iteration": result.iteration}
            Path(folder, POINTER_FILE).write_text(json.dumps(pointer), "utf-8")
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))

    def _read_pointer(self) -> dict[str, Any] | None:
        """Return the name and the iteration of another trial to copy the state of, or None."""
        checkpoint = tune.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            pointer = json.loads(Path(folder, POINTER_FILE).read_text("utf-8"))
        return pointer if pointer["trial"] != self.name else None

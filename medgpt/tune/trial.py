"""One trial: PPO with values that the search has chosen, in a process that Ray Tune started.

The trial has a run directory like any PPO run, and resumes as such; Ray Tune is told of judgements
and decides whether it goes on. The process stays for the next trial, and so do its pools.
"""

import json
import tempfile
from collections.abc import Mapping
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
from medgpt.runs import Run
from medgpt.tune.objective import WORST_OBJECTIVE, JudgeResult, judge_results, objective
from medgpt.tune.pbt_copy import copy_trial_state
from medgpt.tune.trial_records import Status, TrialRecord, TrialRecords

if TYPE_CHECKING:
    from medgpt.tune.trial_pools import TrialPools

ITERATION, OBJECTIVE = "iteration", "objective"  # what Ray Tune compares
POINTER_FILE = "pointer.json"
# keys of the base run's manifest, told again
BASE_MANIFEST_KEYS = ("seed", "parents", "data", "plan", "ptx", "hardware")


@dataclass(frozen=True, kw_only=True)
class TrialSetup:
    """What all trials of a search have in common."""

    ppo_config: PPOStageConfig
    """With all that the search sets for its trials, but their values."""
    config: TuneConfig
    trials_url: str
    """The folder of all trials' runs."""
    base_url: str
    """The run directory that holds the prompts and their order."""
    shared_pools_actor: Any
    """Of the shared pools; None if there are none."""
    num_shared_workers: Mapping[str, int]
    """Of the shared pools."""

    @property
    def num_iterations(self) -> int:
        assert self.ppo_config.ppo.max_iterations is not None
        return self.ppo_config.ppo.max_iterations

    @property
    def copies_states(self) -> bool:
        """Whether trials copy each other's states."""
        return self.config.scheduler == "pbt"


def trial_config(ppo_config: PPOStageConfig, params: Params, url: str) -> PPOStageConfig:
    """A trial's own. Raises ConfigError if the values do not go together."""
    return with_values(
        PPOStageConfig, ppo_config, {**params, "run.dir": url, "run.allow_changes": True}
    )


def run_trial(config: dict[str, Any], setup: TrialSetup) -> None:
    """What Ray Tune calls, once for each trial and again after its death or a change of values."""
    name = tune.get_context().get_trial_name()
    PPOTrial(setup, name, config["trial"]["params"]).run()


class PPOTrial:
    """From its newest checkpoint to its end, or to where Ray Tune ends it by SystemExit."""

    def __init__(self, setup: TrialSetup, name: str, params: Params) -> None:
        self.setup, self.name = setup, name
        self.records = TrialRecords(setup.trials_url)
        self.record = self.records.read(name) or TrialRecord(name, params)
        self.new_params = params
        self.ppo_run = self.records.run(name)
        self.last_reported_iteration = 0
        """The iteration of the last judgement that Ray Tune knows of; it hears of none at 0."""
        self.ppo_config: PPOStageConfig | None = None
        self.pools: TrialPools | None = None

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
            self.ppo_config = trial_config(
                self.setup.ppo_config, self.record.params, self.ppo_run.folder.url
            )
            self._open_run()
        except ConfigError as error:
            self._end("refused", str(error))
            return
        self._report_again()
        self._train(self.ppo_config)

    def on_judged(self, history: Any) -> None:
        """Tell Ray Tune; it may end the trial here, or let it go on."""
        result = judge_results(history, self.setup.config)[-1]
        if result.iteration == self.setup.num_iterations:
            from medgpt.rlhf.setup import export_models

            assert self.ppo_config is not None
            assert self.pools is not None
            export_models(self.ppo_run, self.ppo_config, self.pools, critic=False)
            self.ppo_run.update_manifest(finished=True)
            self._end("finished", "")
        else:
            self._report(result, objective(result, self.setup.config))

    def _train(self, ppo_config: PPOStageConfig) -> None:
        from medgpt.rlhf.diagnosis import Diverged
        from medgpt.rlhf.setup import build_role_pools
        from medgpt.tune import trial_pools

        reporter = ConsoleReporter(f"trial {self.name}")
        role_pools = build_role_pools(ppo_config, self.setup.num_iterations)
        make_pools = partial(
            trial_pools.TrialPools,
            role_pools,
            ppo_config,
            shared_pools_actor=self.setup.shared_pools_actor,
            num_shared_workers=self.setup.num_shared_workers,
            say=reporter.say,
        )
        self.pools = trial_pools.reuse_or_start(role_pools, make_pools)
        try:
            self._iterate(ppo_config, reporter)
        except (Diverged, SystemExit) as end:  # in order, not in the middle of a call
            trial_pools.keep_for_next_trial(self.pools)
            if isinstance(end, SystemExit):
                raise
            self._end("diverged", str(end))
        except BaseException:
            self.pools.close()
            raise
        else:
            trial_pools.keep_for_next_trial(self.pools)
        finally:
            reporter.close()

    def _iterate(self, ppo_config: PPOStageConfig, reporter: ConsoleReporter) -> None:
        from medgpt.rlhf.setup import build_ppo

        base, pools = Run(self.setup.base_url), self.pools
        assert pools is not None
        plan = Plan(
            base.plan.url,
            global_batch_size=ppo_config.ppo.rollout_batch_size,
            max_steps=self.setup.num_iterations,
        )
        ppo = build_ppo(
            self.ppo_run,
            ppo_config,
            pools,
            reporter,
            plan=plan,
            prepared_run=base,
            on_eval=self.on_judged,
        )
        ppo.fit()

    def _open_run(self) -> None:
        """The run directory, with what a run says of its prompts."""
        assert self.ppo_config is not None
        url = self.ppo_run.folder.url
        self.ppo_run = Run.open("ppo", self.ppo_config, run_dir=url, allow_changes=True)
        manifest = Run(self.setup.base_url).manifest
        self.ppo_run.update_manifest(
            **{name: manifest[name] for name in BASE_MANIFEST_KEYS if name in manifest}
        )

    def _report_again(self) -> None:
        """Tell Ray Tune again what it knew before a death or a kill, for its decisions on others:
        all before the newest judgement, which it hears of when training goes on, or at the end."""
        if self.setup.copies_states:
            return
        checkpoint = self.ppo_run.newest_checkpoint()
        iteration = checkpoint[1]["state"]["iteration"] if checkpoint else 0
        for result in judge_results(self.ppo_run.metrics(), self.setup.config):
            if result.iteration < iteration:
                self._report(result, objective(result, self.setup.config))

    def _final_result(self) -> tuple[JudgeResult, float]:
        """The last judgement, and what the trial is worth; nothing if its policy is no use."""
        metrics = self.ppo_run.metrics()
        results = judge_results(metrics, self.setup.config) or [JudgeResult(0, 0.0, 0.0, 0.0)]
        if self.record.status in ("diverged", "refused"):
            num_steps = metrics[-1]["step"] if metrics else 1
            return results[-1]._replace(iteration=num_steps), WORST_OBJECTIVE
        return results[-1], objective(results[-1], self.setup.config)

    def _end(self, status: Status, why: str) -> None:
        """The record first: Ray Tune does not come back from a last report."""
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
        """Whose state to go on with, if it is another trial's."""
        checkpoint = tune.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            pointer = json.loads(Path(folder, POINTER_FILE).read_text("utf-8"))
        return pointer if pointer["trial"] != self.name else None

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
from medgpt.tune.objective import WORST, Point, objective, points
from medgpt.tune.pbt_copy import adopt
from medgpt.tune.trial_records import Record, Records, Status

if TYPE_CHECKING:
    from medgpt.tune.trial_pools import TrialPools

ITERATION, OBJECTIVE = "iteration", "objective"  # what Ray Tune compares
POINTER = "pointer.json"
FACTS = ("seed", "parents", "data", "plan", "ptx", "hardware")  # of the base, told again


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all trials of a search have in common."""

    stage: PPOStageConfig
    """With all that the search sets for its trials, but their values."""
    config: TuneConfig
    trials_url: str
    """The folder of all trials' runs."""
    base_url: str
    """The run directory that holds the prompts and their order."""
    front: Any
    """Of the shared pools; None if there are none."""
    num_workers: Mapping[str, int]
    """Of the shared pools."""

    @property
    def num_iterations(self) -> int:
        assert self.stage.ppo.max_iterations is not None
        return self.stage.ppo.max_iterations

    @property
    def copies(self) -> bool:
        """Whether trials copy each other's states."""
        return self.config.scheduler == "pbt"


def trial_config(stage: PPOStageConfig, params: Params, url: str) -> PPOStageConfig:
    """A trial's own. Raises ConfigError if the values do not go together."""
    return with_values(PPOStageConfig, stage, {**params, "run.dir": url, "run.allow_changes": True})


def run_trial(config: dict[str, Any], setup: Setup) -> None:
    """What Ray Tune calls, once for each trial and again after its death or a change of values."""
    name = tune.get_context().get_trial_name()
    Trial(setup, name, config["trial"]["params"]).run()


class Trial:
    """From its newest checkpoint to its end, or to where Ray Tune ends it by SystemExit."""

    def __init__(self, setup: Setup, name: str, params: Params) -> None:
        self.setup, self.name = setup, name
        self.records = Records(setup.trials_url)
        self.record = self.records.read(name) or Record(name, params)
        self.new_params = params
        self.ppo_run = self.records.run(name)
        self.told = 0
        """The iteration of the last judgement that Ray Tune knows of; it hears of none at 0."""
        self.stage: PPOStageConfig | None = None
        self.pools: TrialPools | None = None

    def run(self) -> None:
        if self.record.done:
            self._repeat()
            self._report(*self._last(), done=True)
            return
        self.record = self.records.write(replace(self.record, status="running", why=""))
        pointer = self._pointer()
        if pointer is not None:
            self.record = adopt(self.records, self.record, self.new_params, pointer)
        try:
            self.stage = trial_config(self.setup.stage, self.record.params, self.ppo_run.folder.url)
            self._open()
        except ConfigError as error:
            self._end("refused", str(error))
            return
        self._repeat()
        self._train(self.stage)

    def judged(self, history: Any) -> None:
        """Tell Ray Tune; it may end the trial here, or let it go on."""
        point = points(history, self.setup.config)[-1]
        if point.iteration == self.setup.num_iterations:
            from medgpt.rlhf.setup import export

            assert self.stage is not None
            assert self.pools is not None
            export(self.ppo_run, self.stage, self.pools, critic=False)
            self.ppo_run.update_manifest(finished=True)
            self._end("finished", "")
        else:
            self._report(point, objective(point, self.setup.config))

    def _train(self, stage: PPOStageConfig) -> None:
        from medgpt.rlhf.diagnosis import Diverged
        from medgpt.rlhf.setup import role_pools
        from medgpt.tune import trial_pools

        reporter = ConsoleReporter(f"trial {self.name}")
        found = role_pools(stage, self.setup.num_iterations)
        make = partial(
            trial_pools.TrialPools,
            found,
            stage,
            front=self.setup.front,
            num_workers=self.setup.num_workers,
            say=reporter.say,
        )
        self.pools = trial_pools.take(found, make)
        try:
            self._iterate(stage, reporter)
        except (Diverged, SystemExit) as end:  # in order, not in the middle of a call
            trial_pools.leave(self.pools)
            if isinstance(end, SystemExit):
                raise
            self._end("diverged", str(end))
        except BaseException:
            self.pools.close()
            raise
        else:
            trial_pools.leave(self.pools)
        finally:
            reporter.close()

    def _iterate(self, stage: PPOStageConfig, reporter: ConsoleReporter) -> None:
        from medgpt.rlhf.setup import build_ppo

        base, pools = Run(self.setup.base_url), self.pools
        assert pools is not None
        plan = Plan(
            base.plan.url,
            global_batch_size=stage.ppo.rollout_batch_size,
            max_steps=self.setup.num_iterations,
        )
        ppo = build_ppo(
            self.ppo_run, stage, pools, reporter, plan=plan, prepared=base, judged=self.judged
        )
        ppo.fit()

    def _open(self) -> None:
        """The run directory, with what a run says of its prompts."""
        assert self.stage is not None
        url = self.ppo_run.folder.url
        self.ppo_run = Run.open("ppo", self.stage, run_dir=url, allow_changes=True)
        known = Run(self.setup.base_url).manifest
        self.ppo_run.update_manifest(**{name: known[name] for name in FACTS if name in known})

    def _repeat(self) -> None:
        """Tell Ray Tune again what it knew before a death or a kill, for its decisions on others:
        all before the newest judgement, which it hears of when training goes on, or at the end."""
        if self.setup.copies:
            return
        saved = self.ppo_run.newest_checkpoint()
        iteration = saved[1]["state"]["iteration"] if saved else 0
        for point in points(self.ppo_run.metrics(), self.setup.config):
            if point.iteration < iteration:
                self._report(point, objective(point, self.setup.config))

    def _last(self) -> tuple[Point, float]:
        """The last judgement, and what the trial is worth; nothing if its policy is no use."""
        metrics = self.ppo_run.metrics()
        known = points(metrics, self.setup.config) or [Point(0, 0.0, 0.0, 0.0)]
        if self.record.status in ("diverged", "refused"):
            steps = metrics[-1]["step"] if metrics else 1
            return known[-1]._replace(iteration=steps), WORST
        return known[-1], objective(known[-1], self.setup.config)

    def _end(self, status: Status, why: str) -> None:
        """The record first: Ray Tune does not come back from a last report."""
        self.record = self.records.write(replace(self.record, status=status, why=why))
        self._report(*self._last(), done=True)

    def _report(self, point: Point, worth: float, *, done: bool = False) -> None:
        if not done and point.iteration <= self.told:
            return
        self.told = point.iteration
        metrics = {ITERATION: point.iteration, OBJECTIVE: worth, "done": done, **point._asdict()}
        if not self.setup.copies:
            tune.report(metrics)
            return
        with tempfile.TemporaryDirectory(prefix="medgpt-") as folder:
            pointer = {"trial": self.name, "iteration": point.iteration}
            Path(folder, POINTER).write_text(json.dumps(pointer), "utf-8")
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))

    def _pointer(self) -> dict[str, Any] | None:
        """Whose state to go on with, if it is another trial's."""
        checkpoint = tune.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            pointer = json.loads(Path(folder, POINTER).read_text("utf-8"))
        return pointer if pointer["trial"] != self.name else None

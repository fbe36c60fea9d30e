"""What stages have in common: opening the run directory and reporting at the end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from medgpt.config.stages import PipelineConfig
from medgpt.config.tune import TuneStageConfig
from medgpt.metrics import ConsoleReporter
from medgpt.runs import Run
from medgpt.stages.pipeline_stages import PipelineStageConfig


def open_run(stage: str, config: PipelineStageConfig | PipelineConfig | TuneStageConfig) -> Run:
    """Open the run directory of a config; see `Run.open`."""
    return Run.open(stage, config, run_dir=config.run.dir, allow_changes=config.run.allow_changes)


@contextmanager
def open_stage(
    stage: str, config: PipelineStageConfig | TuneStageConfig, purpose: str = "train"
) -> Iterator[tuple[Run, ConsoleReporter]]:
    """Open the run directory of a stage and print whether it is finished."""
    run = open_run(stage, config)
    reporter = ConsoleReporter(stage)
    try:
        if run.finished:
            url = run.folder.url
            reporter.say(f"{url} is finished; choose another run.dir to {purpose} again")
        else:
            reporter.say(f"run directory {run.folder.url}")
        yield run, reporter
    finally:
        reporter.close()


def report(stage: str, run: Run, write: Callable[[Run], None]) -> Run:
    """Write the report of a run unless it exists, print its URL and return the run."""
    if not run.folder.exists("report.html"):
        write(run)
    print(f"{stage}: report in {run.folder.url}/report.html")
    return run

"""`medgpt pretrain`, `sft`, `reward`: prepare the data, train on Ray Train, export, report."""

from medgpt.cluster import ray_init
from medgpt.cluster.wait_for_resources import wait_for_resources
from medgpt.config.reward_model import RewardModelConfig
from medgpt.config.stages import PretrainConfig, SFTConfig, TrainStageConfig
from medgpt.data.sources.inputs import check_sources, input_bytes
from medgpt.disk import storage_errors
from medgpt.metrics import ConsoleReporter
from medgpt.runs import Run
from medgpt.stages.opening import open_stage, report
from medgpt.train.driver import TrainingDriver, cluster_resources, describe_data, parent_runs
from medgpt.train.preparation import prepare

EAGER_START_MAX_BYTES = 64 * 2**20  # of input; preparing more needs the CPUs of the workers


def run_pretrain(config: PretrainConfig) -> Run:
    return train_stage("pretrain", config)


def run_sft(config: SFTConfig) -> Run:
    return train_stage("sft", config)


def run_reward(config: RewardModelConfig) -> Run:
    return train_stage("reward", config)


def train_stage(stage: str, config: TrainStageConfig) -> Run:
    """Prepare the data, train, export the model and write the report."""
    with open_stage(stage, config) as (run, reporter):
        if not run.finished:
            _train(run, config, reporter)
            reporter.say(f"model in {run.model.url}")
    return report(stage, run, _write_report)


def _train(run: Run, config: TrainStageConfig, reporter: ConsoleReporter) -> None:
    if run.accepted_changes:
        reporter.say(
            f"resuming at the same step with changes: {'; '.join(run.accepted_changes)}. If they "
            "change the order of the data, rows of this epoch may be repeated or skipped"
        )
    ray_init.init_ray(config.cluster)
    wait_for_resources(config.cluster, reporter.say)
    with storage_errors(run.folder.url, "the run"):
        _prepare_and_train(run, config, reporter)
        lines = run.metrics()
        timings = {"training_s": lines[-1]["time_s"]} if lines else {}
        run.update_manifest(finished=True, timings=timings)


def _prepare_and_train(run: Run, config: TrainStageConfig, reporter: ConsoleReporter) -> None:
    """Start the workers at once, or after the preparation if it needs their CPUs."""
    check_sources(config.data)
    training = TrainingDriver(run, config, reporter)
    if input_bytes(config.data) < EAGER_START_MAX_BYTES:
        training.start()
    try:
        with storage_errors(run.folder.url, "data"):
            data, plan = prepare(run, config, reporter.advance)
            reporter.say(describe_data(data, plan))
            run.update_manifest(
                seed=config.run.seed,
                parents=parent_runs(config.model.name),
                data={key: value for key, value in data.items() if key != "files"},
                plan={key: value for key, value in plan.items() if key != "files"},
                hardware=run.manifest["hardware"] | {"cluster": cluster_resources()},
            )
            training.start_barrier.release()
    except Exception:
        training.abort()
        raise
    training.finish()


def _write_report(run: Run) -> None:
    from medgpt.reports.run import write_run_report  # matplotlib would delay the start of training

    write_run_report(run)

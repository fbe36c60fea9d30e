"""A supervised stage from config to finished run: prepare, train on Ray Train, export."""

import importlib
import threading
from contextlib import nullcontext
from typing import Any

import ray

from medgpt.config import TrainStageConfig
from medgpt.disk import full_disk_told
from medgpt.metrics import ConsoleReporter
from medgpt.runs import MANIFEST, Folder, Run
from medgpt.train import session
from medgpt.train.prepare import prepare
from medgpt.train.progress import Display
from medgpt.train.rank import WorkerJob, train_worker


def run_stage(stage: str, config: TrainStageConfig) -> Run:
    """Run or resume `stage`; a finished run is returned as it is.

    Raises:
        ConfigError: whatever the user can repair, in words.
    """
    run = Run.open(stage, config, run_dir=config.run.dir, allow_changes=config.run.allow_changes)
    reporter = ConsoleReporter(stage)
    try:
        if run.finished:
            reporter.say(f"{run.folder.url} is finished; choose another run.dir to train again")
            return run
        reporter.say(f"run directory {run.folder.url}")
        # seconds of imports, while Ray starts and the corpus is tokenised
        threading.Thread(target=importlib.import_module, args=("ray.train.torch",)).start()
        session.connect(config.cluster)
        session.await_resources(config.cluster, reporter.say)
        with full_disk_told(run.folder.url, "data"):
            data, plan = prepare(run, config, reporter.advance)
        reporter.say(_describe(data, plan))
        run.update_manifest(
            seed=config.run.seed,
            parents=_parents(config),
            data={key: value for key, value in data.items() if key != "files"},
            plan={key: value for key, value in plan.items() if key != "files"},
            hardware=run.manifest["hardware"] | {"cluster": _cluster()},
        )
        _train(run, config, reporter)
        run.update_manifest(finished=True, timings=_timings(run))
        reporter.say(f"model in {run.model.url}")
    finally:
        reporter.close()
    return run


def _train(run: Run, config: TrainStageConfig, reporter: ConsoleReporter) -> None:
    """Start the workers and show their progress until they are done."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from medgpt.train.reservation import reserved_for_data
    from medgpt.train.trainer import LeanTrainer
    from medgpt.train.waiting import Waiting

    cluster = config.cluster
    resources = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    # where Ray Train's controller is, too: on another node it could be lost without the run
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    progress = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    trainer = LeanTrainer(
        train_worker,
        train_loop_config={
            "job": WorkerJob(run_dir=run.folder.url, config=config, progress=progress)
        },
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers,
            elastic_resize_monitor_interval_s=cluster.resize_check_s,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker={name: n for name, n in resources.items() if n},
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=run.folder.url,
            failure_config=FailureConfig(
                max_failures=cluster.max_failures,
                max_preemption_failures=cluster.max_preemptions,
            ),
            callbacks=[Waiting(cluster, progress)],  # type: ignore[list-item] - see there
        ),
    )
    (run.folder / "ray").remove()  # Ray's own record of an earlier attempt is not to be resumed
    display = Display(reporter, log_every=config.train.log_every)
    follower = threading.Thread(target=display.follow, args=(progress,), daemon=True)
    follower.start()
    reporter.advance("starting workers", 0, cluster.fewest_workers)
    failure: TrainingFailedError | None = None
    elastic = not isinstance(cluster.num_workers, int)
    room = reserved_for_data(run.folder.url, cluster.data_cpus) if elastic else nullcontext()
    try:
        with room:
            trainer.fit()
    except TrainingFailedError as error:
        failure = error
    finally:
        progress.put(None)
        follower.join()
        progress.shutdown()
    if display.refused:
        raise display.refused[0] from None
    if failure:
        raise failure


def _describe(data: dict[str, Any], plan: dict[str, Any]) -> str:
    set_aside = sum(sum(source["set_aside"].values()) for source in data["sources"].values())
    rows = sum(source["rows"] for source in data["sources"].values())
    unreadable = sum(len(source["unreadable_files"]) for source in data["sources"].values())
    lost = f"; {unreadable} files could not be read to their end" if unreadable else ""
    return (
        f"{rows:,} rows: {data['num_samples']:,} to train on ({data['num_tokens']:,} tokens), "
        f"{data['validation']['num_samples']:,} held out, {set_aside:,} set aside{lost} "
        f"(tokenised in {data['time_s']:.0f} s, planned in {plan['time_s']:.0f} s)"
    )


def _cluster() -> dict[str, float]:
    """CPUs, GPUs and their types in the cluster."""
    resources = ray.cluster_resources()
    wanted = ("CPU", "GPU", "accelerator_type")
    return {name: n for name, n in sorted(resources.items()) if name.startswith(wanted)}


def _parents(config: TrainStageConfig) -> list[str]:
    """The run (else the model) that this one starts from."""
    name = config.model.name
    if name is None:
        return []
    above, _, last = name.rpartition("/")
    is_run = last == "model" and Folder(above).exists(MANIFEST)
    return [above if is_run else name]


def _timings(run: Run) -> dict[str, float]:
    lines = run.metrics()
    return {"training_s": lines[-1]["time_s"]} if lines else {}

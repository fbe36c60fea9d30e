"""Driver of a supervised stage: starts the workers on Ray Train and follows their progress."""

import threading
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import ray

from medgpt.artifacts import MANIFEST, Folder
from medgpt.config.stages import TrainStageConfig
from medgpt.disk import storage_errors
from medgpt.metrics import ConsoleReporter
from medgpt.runs import Run
from medgpt.train.progress import ProgressDisplay
from medgpt.train.ray_worker import WorkerJob, train_worker
from medgpt.train.start_barrier import StartBarrier

if TYPE_CHECKING:
    from medgpt.train.ray_train_backend import LightTorchTrainer


class TrainingDriver:
    """Starts the workers of a run on Ray Train and displays their progress."""

    def __init__(self, run: Run, config: TrainStageConfig, reporter: ConsoleReporter) -> None:
        self.run, self.config, self.reporter = run, config, reporter
        self.ray_record = run.folder / "ray"
        self.start_barrier = StartBarrier(run.folder.url)
        self.display = ProgressDisplay(reporter, log_every=config.train.log_every)
        self.fit_thread: threading.Thread | None = None
        self.failure: Exception | None = None

    def start(self) -> None:
        """Start the workers, which wait at the start barrier."""
        from ray.util.queue import Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # on the node of Ray Train's controller: on another one it could be lost without the run
        driver_node = NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        self.progress = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": driver_node})
        self.reporter.advance("starting workers", 0, self.config.cluster.min_workers)
        self.ray_record.remove()  # or Ray would read that of an earlier attempt
        self.fit_thread = threading.Thread(target=self._fit, daemon=True)
        self.fit_thread.start()

    def abort(self) -> None:
        """End the workers without training, in the background."""
        if self.fit_thread is not None:
            with suppress(OSError):  # on a full disk they end with this command
                self.start_barrier.abort()
            threading.Thread(target=self._clean_up, args=(self.fit_thread,), daemon=True).start()

    def finish(self) -> None:
        """Wait until the workers have trained. Raises their ConfigError or TrainingFailedError."""
        if self.fit_thread is None:
            self.start()
        assert self.fit_thread is not None
        self.display.follow(self.progress)
        self._clean_up(self.fit_thread)
        if self.display.errors:
            raise self.display.errors[0] from None
        if self.failure is not None:
            raise self.failure

    def _clean_up(self, fit_thread: threading.Thread) -> None:
        fit_thread.join()
        self.progress.shutdown()
        with storage_errors(self.run.folder.url, "start_barrier", kept=[]):
            self.start_barrier.remove()

    def _fit(self) -> None:
        from medgpt.cluster.data_reservation import reserve_cpus_for_data

        cluster = self.config.cluster
        elastic = not isinstance(cluster.num_workers, int)
        url = self.run.folder.url
        try:
            with reserve_cpus_for_data(url, cluster.data_cpus) if elastic else nullcontext():
                self._trainer().fit()
        except Exception as error:
            self.failure = error
        finally:
            self.progress.put(None)

    def _trainer(self) -> "LightTorchTrainer":
        from ray.train import FailureConfig, RunConfig, ScalingConfig

        from medgpt.cluster.ray_storage import storage_settings
        from medgpt.cluster.restart_timeout import RestartTimeout
        from medgpt.train.ray_train_backend import LightTorchTrainer, ProcessGroupConfig

        cluster = self.config.cluster
        resources = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
        job = WorkerJob(
            run_dir=self.run.folder.url,
            config=self.config,
            progress=self.progress,
            start_barrier=self.start_barrier,
        )
        return LightTorchTrainer(
            train_worker,
            train_loop_config={"job": job},
            backend_config=ProcessGroupConfig(gpu=cluster.gpus_per_worker > 0),
            scaling_config=ScalingConfig(
                num_workers=cluster.num_workers,
                elastic_resize_monitor_interval_s=cluster.resize_check_s,
                use_gpu=cluster.gpus_per_worker > 0,
                resources_per_worker={name: n for name, n in resources.items() if n},
                label_selector=cluster.labels or None,
            ),
            run_config=RunConfig(
                **storage_settings(self.ray_record),
                failure_config=FailureConfig(
                    max_failures=cluster.max_failures,
                    max_preemption_failures=cluster.max_preemptions,
                ),
                callbacks=[RestartTimeout(cluster, self.progress)],  # type: ignore[list-item] - an internal class
            ),
        )


def describe_data(data: dict[str, Any], plan: dict[str, Any]) -> str:
    """Return one line about the prepared data."""
    set_aside = sum(sum(source["set_aside"].values()) for source in data["sources"].values())
    rows = sum(source["rows"] for source in data["sources"].values())
    unreadable = sum(len(source["unreadable_files"]) for source in data["sources"].values())
    unused = sorted(
        {name for source in data["sources"].values() for name in source.get("unused", ())}
    )
    unused_note = f"; not used: {', '.join(unused)}" if unused else ""
    unreadable_note = f"; {unreadable} files could not be read to their end" if unreadable else ""
    settings = plan["made_of"]
    is_padded = settings["max_length"] is not None and not settings.get("packed", True)
    padded_note = "; every sample is padded in a row of its own, not packed" if is_padded else ""
    return (
        f"{rows:,} rows: {data['num_samples']:,} to train on ({data['num_tokens']:,} tokens), "
        f"{data['validation']['num_samples']:,} held out, {set_aside:,} set aside"
        f"{unreadable_note}{unused_note}{padded_note} "
        f"(tokenized in {data['time_s']:.0f} s, planned in {plan['time_s']:.0f} s)"
    )


def cluster_resources() -> dict[str, float]:
    """Return the number of CPUs, GPUs and accelerators by type in the cluster."""
    resources = ray.cluster_resources()
    prefixes = ("CPU", "GPU", "accelerator_type")
    return {name: n for name, n in sorted(resources.items()) if name.startswith(prefixes)}


def parent_runs(name: str | None) -> list[str]:
    """Return the run that wrote the model `name`, else `name` itself; empty for None."""
    if name is None:
        return []
    run_dir, _, last = name.rpartition("/")
    is_run = last == "model" and Folder(run_dir).exists(MANIFEST)
    return [run_dir if is_run else name]

"""Engines as Ray actors, and their responses in the run directory.

Requests are sent in chunks of similar length, two per engine at a time. The responses to a chunk
are written as one file, so a resumed evaluation repeats only the chunks that are missing.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from medgpt.artifacts import Folder
from medgpt.cluster.wait_for_resources import waiting_line
from medgpt.config.base import ConfigError
from medgpt.config.evaluation import EvalConfig
from medgpt.config.model import THINKING
from medgpt.eval.engine import EvalEngine, num_characters
from medgpt.eval.requests import Generate, Request, Response, fingerprint, from_json, to_json
from medgpt.models.fetch import run_model_folder
from medgpt.models.model_files import resolve_model_folder

CHUNK_SIZE = 64  # requests; chunks of Generate requests hold pool.batch_replies instead
CHUNKS_IN_FLIGHT = 2  # per engine, so that it never waits for the driver
WAIT_NOTICE_S = 30  # report a wait that takes longer
PING_TIMEOUT_S = 30  # a living engine answers within this time, even on a busy machine


class ResponseStore:
    """The responses to one task's requests, as JSON lines in a folder."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.num_files = len(self._files())

    def read(self, requests: Sequence[Request]) -> dict[str, Response]:
        """Return the stored responses by request id, without those to a changed request."""
        wanted_fingerprints = {request.id: fingerprint(request) for request in requests}
        responses = {}
        for name in self._files():
            for record in self.folder.read_jsonl(name):
                if wanted_fingerprints.get(record["response"]["id"]) == record["request"]:
                    response = from_json(record["response"])
                    responses[response.id] = response
        return responses

    def _files(self) -> list[str]:
        """Return the complete files; a killed writer may have left a temporary one."""
        return [name for name in self.folder.names() if not name.startswith(".")]

    def write(self, requests: Sequence[Request], responses: Sequence[Response]) -> None:
        """Write the responses as one new file."""
        fingerprints = {request.id: fingerprint(request) for request in requests}
        records = [{"request": fingerprints[r.id], "response": to_json(r)} for r in responses]
        self.folder.write_jsonl(f"{self.num_files:06d}.jsonl", records)
        self.num_files += 1


class EngineWorker:
    """Ray actor with one engine; it loads the model at the first call that needs it."""

    def __init__(self, config: EvalConfig) -> None:
        torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
        self.config = config

    @cached_property
    def engine(self) -> EvalEngine:
        config = self.config
        folder = resolve_model(str(config.model.name))
        return EvalEngine(
            folder,
            precision=config.model.precision,
            pool=config.pool,
            trust_remote_code=config.model.trust_remote_code,
            fresh_seed=config.run.seed if config.model.untrained else None,
            thinking=THINKING[config.model.thinking],
            thinking_tokens=config.model.thinking_tokens,
        )

    @ray.method(concurrency_group="pings")
    def ping(self) -> None:
        """Return at once, even while the engine works."""

    def load(self) -> None:
        """Load the model. Raises ConfigError if it cannot generate."""
        _ = self.engine

    def run(self, requests: Sequence[Request]) -> list[Response]:
        return self.engine.run(requests)


def resolve_model(name: str) -> str:
    """Return a local folder with the model of a run, path, URI or hub id.

    Raises:
        ConfigError: there is no such model.
    """
    folder = run_model_folder(name)
    is_model = any((folder / file).exists() for file in ("config.json", "adapter_config.json"))
    return str(folder if is_model else resolve_model_folder(name))


class EnginePool:
    """The engines of an evaluation; each joins the work as soon as its actor has started."""

    def __init__(self, config: EvalConfig, write_line: Callable[[str], None]) -> None:
        cluster = config.cluster
        self.wait_s, self.write_line = cluster.wait_s, write_line
        self.max_failures = max_failures = cluster.max_failures
        options: dict[str, Any] = {
            "num_cpus": cluster.cpus_per_worker,
            "num_gpus": cluster.gpus_per_worker,
            "label_selector": cluster.labels,
            "max_restarts": max_failures,
            "max_task_retries": max_failures,
            "concurrency_groups": {"pings": 1},
        }
        remote_worker: Any = ray.remote(**options)(EngineWorker)
        self.batch_replies = config.pool.batch_replies
        self.workers = [remote_worker.remote(config) for _ in range(cluster.max_workers)]
        self.loading = {worker.load.remote(): worker for worker in self.workers}
        self.ready: list[Any] = []

    def answer_all(
        self,
        requests: Sequence[Request],
        store: ResponseStore,
        report_progress: Callable[[int], None],
    ) -> None:
        """Answer every request that has no response in `store`, and write the responses there.

        Args:
            report_progress: called with the number of answered requests after each chunk.

        Raises:
            ConfigError: an engine raised it, an engine died more than cluster.max_failures times,
                or no engine answered a ping for cluster.wait_s.
        """
        answered = store.read(requests)
        unanswered = [request for request in requests if request.id not in answered]
        chunks, num_answered = deque(self._chunks(unanswered)), len(requests) - len(unanswered)
        pending: dict[Any, tuple[Any, list[Request]]] = {}
        for worker in self.ready:
            self._submit_chunks(worker, chunks, pending)
        report_progress(num_answered)
        while chunks or pending:
            ref = self._wait_for_any([*self.loading, *pending])
            if ref in self.loading:
                worker = self.loading.pop(ref)
                self._get_result(ref)
                self.ready.append(worker)
            else:
                worker, chunk = pending.pop(ref)
                store.write(chunk, self._get_result(ref))
                report_progress(num_answered := num_answered + len(chunk))
            self._submit_chunks(worker, chunks, pending)

    def _wait_for_any(self, refs: list[Any]) -> Any:
        """Return the first finished ref; wait as long as any engine answers pings."""
        last_ping_s, has_told_wait = time.monotonic(), False
        while True:
            done, _ = ray.wait(refs, num_returns=1, timeout=min(WAIT_NOTICE_S, self.wait_s))
            if done:
                return done[0]
            pings = [worker.ping.remote() for worker in self.workers]
            if ray.wait(pings, num_returns=1, timeout=PING_TIMEOUT_S)[0]:
                last_ping_s = time.monotonic()
                continue
            if not has_told_wait:
                self.write_line(waiting_line(self.wait_s, "an engine"))
                has_told_wait = True
            if time.monotonic() - last_ping_s > self.wait_s:
                raise ConfigError(
                    f"cluster.wait_s={self.wait_s:g}: no engine answered in this time; repeat the "
                    "command when the cluster has its nodes again, finished answers are kept"
                )

    def close(self) -> None:
        """Kill the engines."""
        for worker in self.workers:
            ray.kill(worker)

    def _submit_chunks(
        self, worker: Any, chunks: deque[list[Request]], pending: dict[Any, Any]
    ) -> None:
        num_pending = sum(other is worker for other, _ in pending.values())
        for _ in range(min(CHUNKS_IN_FLIGHT - num_pending, len(chunks))):
            chunk = chunks.popleft()
            pending[worker.run.remote(chunk)] = (worker, chunk)

    def _chunks(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """Yield chunks, longest requests first, so that a shortage of memory shows at once."""
        for request_type in dict.fromkeys(type(request) for request in requests):
            chunk_size = self.batch_replies if request_type is Generate else CHUNK_SIZE
            longest_first = sorted(
                (r for r in requests if type(r) is request_type), key=num_characters, reverse=True
            )
            for start in range(0, len(longest_first), chunk_size):
                yield longest_first[start : start + chunk_size]

    def _get_result(self, ref: Any) -> Any:
        try:
            return ray.get(ref)
        except RayTaskError as error:
            if isinstance(error.cause, ConfigError):
                raise error.cause from None
            raise
        except RayActorError:
            raise ConfigError(
                f"cluster.max_failures={self.max_failures}: an engine died more often than that, "
                "perhaps for lack of memory; lower pool.batch_tokens or pool.batch_replies and "
                "repeat the command, finished answers are kept"
            ) from None

"""Engines on Ray that answer requests, and the answers in a run directory.

Requests go out in chunks of similar length, two for each engine at a time. A chunk's responses are
written as one file when they come; what a killed evaluation wrote is not asked again.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from medgpt.artifacts import Folder
from medgpt.config.base import ConfigError
from medgpt.config.evaluation import EvalConfig
from medgpt.eval.engine import Engine, size
from medgpt.eval.requests import Reply, Request, Response, fingerprint, from_json, to_json
from medgpt.models.base import local_folder
from medgpt.models.fetch import model_folder

CHUNK = 64  # requests; of replies as many as are generated together
AHEAD = 2  # chunks that an engine has, so that it need not wait for the driver
SAID_AFTER_S = 30  # a wait that takes longer is told
PING_S = 30  # in which a living engine answers, however busy it and its machine

Advance = Callable[[int], None]
Say = Callable[[str], None]


class Responses:
    """Responses to one task's requests, in files of a folder."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.next = len(self._files())

    def read(self, requests: Sequence[Request]) -> dict[str, Response]:
        """By id, those that answer one of `requests` as it is now."""
        wanted = {request.id: fingerprint(request) for request in requests}
        found = {}
        for name in self._files():
            # splitlines would also cut at U+2028 and its like, which JSON leaves inside texts
            *lines, _ = self.folder.read_text(name).split("\n")
            for line in lines:
                tree = json.loads(line)
                if wanted.get(tree["response"]["id"]) == tree["request"]:
                    response = from_json(tree["response"])
                    found[response.id] = response
        return found

    def _files(self) -> list[str]:
        """Without what a writer that was killed left behind."""
        return [name for name in self.folder.names() if not name.startswith(".")]

    def write(self, requests: Sequence[Request], responses: Sequence[Response]) -> None:
        """All or none of them."""
        asked = {request.id: fingerprint(request) for request in requests}
        lines = [
            json.dumps({"request": asked[r.id], "response": to_json(r)}, ensure_ascii=False) + "\n"
            for r in responses
        ]
        self.folder.write_text(f"{self.next:06d}.jsonl", "".join(lines))
        self.next += 1


class Worker:
    """An engine that loads its model when it is first asked."""

    def __init__(self, config: EvalConfig) -> None:
        torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
        self.config = config

    @cached_property
    def engine(self) -> Engine:
        config = self.config
        folder = resolve_model(str(config.model.name))
        return Engine(
            folder,
            precision=config.model.precision,
            pool=config.pool,
            trust_remote_code=config.model.trust_remote_code,
            fresh_seed=config.run.seed if config.model.untrained else None,
        )

    @ray.method(concurrency_group="signs")
    def ping(self) -> None:
        """Answered also while the engine works."""

    def load(self) -> None:
        """Raises ConfigError: there is no model that generates."""
        _ = self.engine

    def run(self, requests: Sequence[Request]) -> list[Response]:
        return self.engine.run(requests)


def resolve_model(name: str) -> str:
    """A folder of this machine with the model of a run, a path, a URI or a hub id.

    Raises:
        ConfigError: there is none.
    """
    folder = model_folder(name)
    is_here = any((folder / file).exists() for file in ("config.json", "adapter_config.json"))
    return str(folder if is_here else local_folder(name))


class Pool:
    """`cluster.num_workers` engines; those that are up work, others join when they come."""

    def __init__(self, config: EvalConfig, say: Say) -> None:
        cluster = config.cluster
        self.wait_s, self.say = cluster.wait_s, say
        failures = cluster.max_failures
        options: dict[str, Any] = {
            "num_cpus": cluster.cpus_per_worker,
            "num_gpus": cluster.gpus_per_worker,
            "label_selector": cluster.labels,
            "max_restarts": failures,
            "max_task_retries": failures,
            "concurrency_groups": {"signs": 1},
        }
        remote: Any = ray.remote(**options)(Worker)
        self.batch_replies = config.pool.batch_replies
        self.max_failures = failures
        self.workers = [remote.remote(config) for _ in range(cluster.most_workers)]
        self.starting = {worker.load.remote(): worker for worker in self.workers}
        self.ready: list[Any] = []

    def ask(self, requests: Sequence[Request], responses: Responses, advance: Advance) -> None:
        """Have all requests answered and written that are not yet.

        Args:
            advance: told how many are answered, again and again.

        Raises:
            ConfigError: what the user can repair, engines died more often than they may, or none
                gave a sign of life for cluster.wait_s.
        """
        answered = responses.read(requests)
        left = [request for request in requests if request.id not in answered]
        chunks, done = deque(self._chunks(left)), len(requests) - len(left)
        pending: dict[Any, tuple[Any, list[Request]]] = {}
        for worker in self.ready:
            self._feed(worker, chunks, pending)
        advance(done)
        while chunks or pending:
            ref = self._first([*self.starting, *pending])
            if ref in self.starting:
                worker = self.starting.pop(ref)
                self._get(ref)
                self.ready.append(worker)
            else:
                worker, asked = pending.pop(ref)
                responses.write(asked, self._get(ref))
                advance(done := done + len(asked))
            self._feed(worker, chunks, pending)

    def _first(self, refs: list[Any]) -> Any:
        """Whichever is there first. An engine may work for long, but not be gone for long."""
        heard, said = time.monotonic(), False
        while True:
            done, _ = ray.wait(refs, num_returns=1, timeout=min(SAID_AFTER_S, self.wait_s))
            if done:
                return done[0]
            pings = [worker.ping.remote() for worker in self.workers]
            if ray.wait(pings, num_returns=1, timeout=PING_S)[0]:
                heard = time.monotonic()
                continue
            if not said:
                self.say(f"waiting up to {self.wait_s:g} s for an engine")
                said = True
            if time.monotonic() - heard > self.wait_s:
                raise ConfigError(
                    f"cluster.wait_s={self.wait_s:g}: no engine gave a sign of life in this time; "
                    "repeat the command when the cluster has its nodes again, what is answered is "
                    "kept"
                )

    def close(self) -> None:
        """End the engines."""
        for worker in self.workers:
            ray.kill(worker)

    def _feed(self, worker: Any, chunks: deque[list[Request]], pending: dict[Any, Any]) -> None:
        busy = sum(other is worker for other, _ in pending.values())
        for _ in range(min(AHEAD - busy, len(chunks))):
            chunk = chunks.popleft()
            pending[worker.run.remote(chunk)] = (worker, chunk)

    def _chunks(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """The longest first: they fail first if memory is short."""
        for kind in dict.fromkeys(type(request) for request in requests):
            count = self.batch_replies if kind is Reply else CHUNK
            rows = sorted((r for r in requests if type(r) is kind), key=size, reverse=True)
            for start in range(0, len(rows), count):
                yield rows[start : start + count]

    def _get(self, ref: Any) -> Any:
        try:
            return ray.get(ref)
        except RayTaskError as error:
            if isinstance(error.cause, ConfigError):
                raise error.cause from None
            raise
        except RayActorError:
            raise ConfigError(
                f"cluster.max_failures={self.max_failures}: an engine died more often than that, "
                "perhaps for lack of memory; lower pool.batch_tokens or pool.batch_replies, and "
                "repeat the command, what is answered is kept"
            ) from None

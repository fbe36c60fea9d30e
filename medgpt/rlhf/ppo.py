"""PPO over the pools: the whole system in one loop.

The driver moves refs from pool to pool. It sees metrics, not tensors.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from medgpt.artifacts import FileEntry
from medgpt.config.ppo import PPOStageConfig
from medgpt.metrics import ConsoleReporter, MetricsWriter
from medgpt.rlhf.diagnosis import Diverged, History, diagnose
from medgpt.rlhf.heldout_eval import Judging
from medgpt.rlhf.pools.pool import Pool
from medgpt.rlhf.pools.pools import DataLost, Leaving, PoolDied, Pools
from medgpt.rlhf.prompts import Cursor
from medgpt.rlhf.rewards.total import reward_metrics
from medgpt.rlhf.roles.actor import Actor
from medgpt.rlhf.roles.common import Task, UpdateResult
from medgpt.rlhf.roles.critic import Critic
from medgpt.rlhf.roles.reference import Reference
from medgpt.rlhf.roles.reward import Reward
from medgpt.rlhf.roles.rollout import Rollout
from medgpt.rlhf.rollout_batch import Lessons, Prompts, Sequences, join_sequences
from medgpt.rlhf.state import Checkpoint, State, newest, next_kl_coef, read_sequences
from medgpt.rlhf.telemetry import keep_samples, usage
from medgpt.runs import Run
from medgpt.train.audit import Audit

Refs = Sequence[Any]  # of what each worker of a pool answers
PromptStream = Callable[[int], Iterator[Prompts]]  # from an iteration on
LessonStream = Callable[[int], Iterator[Lessons]]
FACTS = (  # label, metric, format
    ("score", "ppo/score_mean", ".3f"),
    ("kl", "actor/kl_ref", ".3f"),
    ("tokens", "rollout/response_tokens", ".0f"),
    ("samples/s", "ppo/samples_per_s", ".1f"),
)


@dataclass(frozen=True)
class Batch:
    """The rollouts of an iteration, done or on their way."""

    iteration: int
    weight_version: int
    epoch: int
    prompts: Any  # ref
    num_prompts: int
    rollouts: Refs
    usage: Refs = ()  # of the rollout workers that sampled, if this attempt has seen them


class PPO:
    """A run from its newest checkpoint to its end."""

    def __init__(
        self,
        run: Run,
        config: PPOStageConfig,
        pools: Pools,
        *,
        prompts: PromptStream,
        sync: Callable[[int], dict[str, float]],
        num_iterations: int,
        reporter: ConsoleReporter,
        lessons: LessonStream | None = None,
        judged: Callable[[History], None] | None = None,
    ) -> None:
        """
        Args:
            sync: gives the rollout pool the actor's weights under a version.
            lessons: PPO-ptx's.
            judged: is told all metrics up to an iteration that was judged and, if that was due,
                saved; before training goes on. After a restart perhaps of the same one again.
        """
        self.run, self.config, self.pools, self.reporter = run, config, pools, reporter
        self.num_iterations, self.prompts_from, self.sync = num_iterations, prompts, sync
        self.judged = judged
        self.prompts = Cursor(lambda start: self.prompts_from(start))
        assert (lessons is None) == (config.ptx is None), "lessons go with [ptx]"
        self.lessons = None if lessons is None else Cursor(lessons)
        self.actor: Pool[Actor] = pools.pools["actor"]
        self.critic: Pool[Critic] = pools.pools["critic"]
        self.reward: Pool[Reward] = pools.pools["reward"]
        self.rollout: Pool[Rollout] = pools.pools["rollout"]
        self.reference: Pool[Reference] | None = pools.pools.get("reference")
        self.judging = Judging(config, pools)
        sensitive = any(source.sensitive for source in config.data.sources)
        self.shown = 0 if sensitive else config.report.samples
        self.deaths = self.moves = 0
        self.learning = False
        """Updates are on their way: if they end in a loss, one rank may have learnt and another
        wait for it."""
        self.renewed: set[str] = set()
        """Roles whose pools were rebuilt since the loss that is being recovered from."""
        self.times: dict[str, float] = {}  # of an iteration's phases
        self.sync_metrics: dict[str, float] = {}
        self.saving: Checkpoint | None = None
        self.metrics: MetricsWriter | None = None  # of this attempt

    @property
    def _log(self) -> MetricsWriter:
        assert self.metrics is not None
        return self.metrics

    def fit(self, finish: Callable[[], object] = lambda: None) -> None:
        """Iterate to the end; the last iteration is saved.

        Args:
            finish: is called at the end, and again if a pool dies in it.

        Raises:
            PoolDied, DataLost: it happened more often than cluster.max_failures.
            Leaving: it happened more often than cluster.max_preemptions.
            Diverged: what the run became is not worth going on with.
        """
        try:
            self._go_on(finish)
        finally:  # a run that halts has a report, too
            if self.metrics is not None:
                self.metrics.close()

    def _go_on(self, finish: Callable[[], object]) -> None:
        loss: PoolDied | DataLost | Leaving | None = None
        while True:
            try:
                if isinstance(loss, Leaving):
                    self._leave(loss)
                elif loss is not None:
                    self._recover(loss)
                elif self.metrics is None:
                    self._rewind()
                loss = None
                self._examine()
                if self.state.iteration == self.num_iterations:
                    self._finish_save()
                    finish()
                    break
                self.pools.check_nodes()
                self._iterate()
            except Leaving as leaving:
                loss = leaving
                if 0 <= self.config.cluster.max_preemptions <= self.moves:
                    raise
            except (PoolDied, DataLost) as error:  # perhaps in the middle of a recovery
                loss = error
                self.deaths += 1
                if 0 <= self.config.cluster.max_failures < self.deaths:
                    raise

    def _iterate(self) -> None:
        began, self.times = time.monotonic(), {}
        state, config = self.state, self.config.ppo
        batch = self.in_flight or self._generate(state.iteration)
        with self._timed("generate"):
            self.pools.wait(batch.rollouts, "generate", watch=True)
        self._finish_save()  # actor and critic wrote it meanwhile
        self.in_flight, self.sampled = None, batch
        if config.async_rollouts and state.iteration + 1 < self.num_iterations:
            self.in_flight = self._generate(state.iteration + 1)

        with self._timed("score"):
            scores = self.reward.call(Reward.score, batch.prompts, *batch.rollouts)
            values = self.critic.call(Critic.values, *batch.rollouts)
            logprobs = self.actor.call(Actor.logprobs, *batch.rollouts)
            reference = self._reference_logprobs(batch.rollouts)
            parts = [*batch.rollouts, *scores, *values, *logprobs, *reference]
            lessons = self._lessons(state.iteration)  # meanwhile
            self.pools.wait(parts, "score", watch=True)
            # before anything is learnt: a death from now on may lose them
            rewarded = [part.rewarded for part in self.pools.get(scores, "score")]

        with self._timed("update"):
            task = Task(
                iteration=state.iteration,
                weight_version=batch.weight_version,
                kl_coef=state.kl_coef,
                score_stats=state.score_stats,
                actor_learns=state.iteration >= self.config.critic.warmup_iterations,
            )
            self.learning, self.sampled = True, None
            fitted = self.critic.call(Critic.update, task, *parts)
            improved = self.actor.call(Actor.update, task, *parts, *lessons)
            answers = self.pools.get([*improved, *fitted], "update")
            self.learning = False
        learnt: UpdateResult = answers[0]
        state.iteration += 1
        state.score_stats = learnt.score_stats
        state.kl_coef = next_kl_coef(state.kl_coef, learnt.mean_kl, len(learnt.sample_ids), config)

        metrics = learnt.metrics | answers[len(improved)] | reward_metrics(rewarded)
        metrics |= self._speed(batch.num_prompts, time.monotonic() - began)
        tokens = metrics["rollout/response_tokens"] * batch.num_prompts
        self._report(metrics | usage(self.pools, batch.usage, tokens))
        if config.audit:
            self.audit.note(batch.epoch, batch.iteration, ((id, 0) for id in learnt.sample_ids))
            self.audit.write(self.audit.take())
        if state.iteration % config.checkpoint_every == 0 or state.iteration == self.num_iterations:
            self._save()
        if self.shown and (state.iteration == 1 or state.iteration % self.config.report.every == 0):
            keep_samples(self.pools, self.run, step=state.iteration, count=self.shown)

    def _generate(self, iteration: int) -> Batch:
        """Begin the rollouts of an iteration, with weights as new as the actor has them."""
        self._bring_weights()
        with self._timed("prompts"):
            prompts = self._prompts(iteration)
            ref = self.pools.put(prompts)
        rollouts = self.rollout.call(Rollout.generate, ref, iteration, self.synced)
        usage = self.rollout.usage()
        return Batch(iteration, self.synced, prompts.epoch, ref, len(prompts), rollouts, usage)

    def _bring_weights(self) -> None:
        """Give the rollout pool the actor's weights, if it has not got them."""
        if self.synced != self.state.iteration:
            with self._timed("sync"):
                self.sync_metrics = self.sync(self.state.iteration)
            self.synced = self.state.iteration

    def _reference_logprobs(self, rollouts: Refs) -> Refs:
        if self.reference is None:
            return self.actor.call(Actor.reference_logprobs, *rollouts)
        temperature = self.config.rollout.temperature
        return self.reference.call(Reference.logprobs, temperature, *rollouts)

    def _prompts(self, iteration: int) -> Prompts:
        return self.prompts.take(iteration)

    def _lessons(self, iteration: int) -> Refs:
        """Of PPO-ptx, none without it or while the critic warms up."""
        if self.lessons is None or iteration < self.config.critic.warmup_iterations:
            return []
        return [self.pools.put(self.lessons.take(iteration))]

    def _recover(self, loss: PoolDied | DataLost) -> None:
        """Make the pools work again. If the actor or the critic died or was learning, what was
        learnt since the last checkpoint is lost; else the batch is done again."""
        if isinstance(loss, PoolDied):
            self.reporter.say(f"{loss}; the pool is rebuilt")
            self.renewed.add(loss.role)  # though it may not live through it
            self.renewed |= self.pools.rebuild(loss)
        else:
            self.reporter.say(f"{loss}; it is made again")
        self.synced, self.in_flight, self.sampled = -1, None, None
        if self.learning or self.renewed & {"actor", "critic"}:
            if self.learning or newest(self.run) is None:  # then back to the first weights
                for pool in (self.actor, self.critic):
                    if pool.role not in self.renewed:
                        self.renewed.add(pool.role)
                        ranks = range(len(pool.workers))
                        self.pools.rebuild(PoolDied(pool.role, ranks, "starts again"))
            self._rewind()
        self.learning = False
        self.renewed.clear()

    def _leave(self, leaving: Leaving) -> None:
        """Save what was learnt, and take the pools away from nodes that are about to end."""
        self.reporter.say(f"{leaving}; what was learnt is saved, then the pools move")
        self._finish_save()
        found = newest(self.run)
        if self.state.iteration and (found is None or found[1].iteration < self.state.iteration):
            self.in_flight = self.sampled or self.in_flight
            self._save()
            self._finish_save()
        self.pools.move(leaving.roles)
        self.moves += 1
        self._rewind()

    def _rewind(self) -> None:
        """Continue from the newest checkpoint, or from the beginning; a new attempt of the run."""
        found = newest(self.run)
        self.state = State(kl_coef=self.config.ppo.kl_coef)
        self.synced = -1
        self.in_flight: Batch | None = None
        self.sampled: Batch | None = None  # and not learnt from
        self.saving = None
        if found is not None:
            folder, self.state = found
            loads = self.actor.call(Actor.load, (folder / "actor").url)
            loads += self.critic.call(Critic.load, (folder / "critic").url)
            self.pools.get(loads, "load checkpoint")
            sequences = read_sequences(folder)
            if sequences is not None:
                self.in_flight = self._as_batch(sequences)
        self.attempt = self.run.manifest["attempt"] + 1
        self.run.update_manifest(attempt=self.attempt)
        if self.metrics is not None:
            self.metrics.close()
            self.metrics = None
        self.metrics = MetricsWriter(self.run, attempt=self.attempt, time_s=self.state.time_s)
        self.audit = Audit(self.run.folder / "audit", attempt=self.attempt, rank=0)
        self.history = [
            {name: value for name, value in line.items() if name not in ("time_s", "attempt")}
            for line in self.run.metrics()
            if line["step"] <= self.state.iteration
        ]
        if self.attempt > 1:
            done = self.state.iteration
            self.reporter.say(f"attempt {self.attempt} continues after iteration {done}")

    def _as_batch(self, sequences: Sequences) -> Batch:
        """Rollouts of the next iteration that an earlier attempt has sampled."""
        iteration, version = self.state.iteration, sequences.weight_version
        prompts = self._prompts(iteration)
        assert prompts.sample_ids == sequences.sample_ids
        refs = [self.pools.put(sequences)]
        return Batch(iteration, version, prompts.epoch, self.pools.put(prompts), len(prompts), refs)

    def _save(self) -> None:
        """Begin a checkpoint; actor and critic write it before their next work."""
        folder = self.run.checkpoint(self.state.iteration)
        folder.remove()  # of an attempt that died while writing it
        self.state.time_s = self._log.time_s
        self._log.sync()
        actor = self.actor.call(Actor.save, (folder / "actor").url)
        critic = self.critic.call(Critic.save, (folder / "critic").url)
        parts = {"actor": self._files(actor), "critic": self._files(critic)}
        self.saving = Checkpoint(self.run, self.state, parts, keep=self.config.ppo.keep_checkpoints)

    def _finish_save(self) -> None:
        """Wait for what is being written and make it a checkpoint."""
        if self.saving is not None:
            batch, sequences = self.in_flight, None
            if batch is not None:
                sequences = join_sequences(self.pools.get(batch.rollouts, "generate"))
            self.saving.finish(in_flight=sequences)
            self.saving = None

    def _files(self, refs: Refs) -> Callable[[], list[FileEntry]]:
        return lambda: [file for part in self.pools.get(refs, "save") for file in part]

    def _examine(self) -> None:
        """Have the policy judged, if that is due. Raises Diverged if the run must end here."""
        step = self.state.iteration
        has_line = bool(self.history) and self.history[-1]["step"] == step
        latest = self.history[-1] if has_line else {"step": step}
        if self.judging.due(step) and "time/judge_s" not in latest:
            began = time.monotonic()
            self._bring_weights()
            marks = self.judging.metrics()
            latest = latest | marks | {"time/judge_s": time.monotonic() - began}
            self._log.log(step, latest)
            if has_line:
                self.history.pop()
            self.history.append(latest)
        if self.history and (why := diagnose(self.history, self.config.diagnosis)):
            raise Diverged(f"after iteration {step}: {why}")
        if self.judged is not None and "time/judge_s" in latest:
            self._finish_save()
            self._log.sync()
            self.judged(self.history)

    def _speed(self, num_samples: int, elapsed_s: float) -> dict[str, float]:
        return self.sync_metrics | {
            "ppo/samples_per_s": num_samples / elapsed_s,
            "time/iteration_s": elapsed_s,
            "time/wait_s": elapsed_s - sum(self.times.values()),
            **{f"time/{phase}_s": seconds for phase, seconds in self.times.items()},
        }

    def _report(self, metrics: dict[str, float]) -> None:
        step = self.state.iteration
        self._log.log(step, metrics)
        self.history.append({"step": step, **metrics})
        facts = "  ".join(f"{label} {metrics[name]:{form}}" for label, name, form in FACTS)
        due = step % self.config.ppo.log_every == 0 or step == self.num_iterations
        self.reporter.advance("iterations", step, self.num_iterations, facts, say=due)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.times[phase] = self.times.get(phase, 0.0) + time.monotonic() - began

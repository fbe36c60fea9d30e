"""The PPO loop: the whole system in one file.

The driver passes object refs from pool to pool; it sees metrics, not tensors.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from medgpt.config.ppo import PPOStageConfig
from medgpt.metrics import ConsoleReporter
from medgpt.rlhf.checkpoint import (
    PendingCheckpoint,
    PPOState,
    newest_checkpoint,
    next_kl_coef,
    read_sequences,
)
from medgpt.rlhf.diagnosis import Diverged, History, diagnose
from medgpt.rlhf.heldout_eval import HeldoutEval
from medgpt.rlhf.pools.pool import Pool
from medgpt.rlhf.pools.pools import DataLost, NodesDraining, PoolDied, Pools
from medgpt.rlhf.prompts import SeekableStream
from medgpt.rlhf.rewards.weighted_sum import reward_metrics
from medgpt.rlhf.roles.actor import Actor
from medgpt.rlhf.roles.common import UpdateResult, UpdateTask
from medgpt.rlhf.roles.critic import Critic
from medgpt.rlhf.roles.reference import Reference
from medgpt.rlhf.roles.reward import Reward
from medgpt.rlhf.roles.rollout import Rollout
from medgpt.rlhf.rollout_batch import NO_VERSION, Prompts, PtxBatch, join_sequences
from medgpt.rlhf.telemetry import PhaseTimer, RunLog, save_report_samples, usage_metrics
from medgpt.runs import Run

Refs = Sequence[Any]  # one object ref per worker of a pool
PromptStream = Callable[[int], Iterator[Prompts]]  # prompts of this iteration and all later ones
PtxStream = Callable[[int], Iterator[PtxBatch]]
CONSOLE_METRICS = (  # label, metric, format
    ("score", "ppo/score_mean", ".3f"),
    ("kl", "actor/kl_ref", ".3f"),
    ("tokens", "rollout/response_tokens", ".0f"),
    ("samples/s", "ppo/samples_per_s", ".1f"),
)


@dataclass(frozen=True)
class RolloutRefs:
    """Object refs of one iteration's rollouts, finished or in flight."""

    iteration: int
    weight_version: int
    epoch: int
    prompts: Any  # ref of Prompts
    num_prompts: int
    rollouts: Refs
    usage_refs: Refs = ()  # Usage of the rollout workers; empty if an earlier attempt sampled


class PPO:
    """Train from the newest checkpoint of a run to its last iteration."""

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
        ptx: PtxStream | None = None,
        on_eval: Callable[[History], None] | None = None,
    ) -> None:
        """
        Args:
            sync: sends the actor's weights to the rollout pool under this version number.
            ptx: yields the PPO-ptx batch of each iteration.
            on_eval: called with the metrics history after each held-out evaluation and after the
                checkpoint of that iteration, if one was due. May be called twice for the same
                iteration after a restart.
        """
        self.run, self.config, self.pools, self.reporter = run, config, pools, reporter
        self.num_iterations, self.sync, self.on_eval = num_iterations, sync, on_eval
        self.prompts = SeekableStream(prompts)
        assert (ptx is None) == (config.ptx is None), "a ptx stream and [ptx] go together"
        self.ptx = None if ptx is None else SeekableStream(ptx)
        self.actor: Pool[Actor] = pools.pools["actor"]
        self.critic: Pool[Critic] = pools.pools["critic"]
        self.reward: Pool[Reward] = pools.pools["reward"]
        self.rollout: Pool[Rollout] = pools.pools["rollout"]
        self.reference: Pool[Reference] | None = pools.pools.get("reference")
        self.heldout_eval = HeldoutEval(config, pools)
        self.log = RunLog(run)
        self.timer = PhaseTimer()
        self.num_failures = self.num_preemptions = 0
        self.is_updating = False
        """Updates are in flight: after a failure, some ranks may have stepped and others not."""
        self.rebuilt_roles: set[str] = set()
        """Roles whose pools were rebuilt during the current recovery."""
        self.sync_metrics: dict[str, float] = {}
        self.pending_checkpoint: PendingCheckpoint | None = None

    def fit(self, finish: Callable[[], object] = lambda: None) -> None:
        """Train to the last iteration and save a checkpoint of it.

        Args:
            finish: called at the end, and again if a pool dies while it runs.

        Raises:
            PoolDied, DataLost: failures exceeded cluster.max_failures.
            NodesDraining: preemptions exceeded cluster.max_preemptions.
            Diverged: the diagnosis halted the run.
        """
        try:
            self._run_with_recovery(finish)
        finally:  # the report of a halted run reads the metrics
            self.log.close()

    def _run_with_recovery(self, finish: Callable[[], object]) -> None:
        failure: PoolDied | DataLost | NodesDraining | None = None
        while True:
            try:
                if isinstance(failure, NodesDraining):
                    self._move_off_draining_nodes(failure)
                elif failure is not None:
                    self._recover(failure)
                elif not self.log.is_open:
                    self._restart_from_checkpoint()
                failure = None
                self._evaluate_and_diagnose()
                if self.state.iteration == self.num_iterations:
                    self._finish_checkpoint()
                    finish()
                    break
                self.pools.check_nodes()
                self._iterate()
            except NodesDraining as draining:
                failure = draining
                if 0 <= self.config.cluster.max_preemptions <= self.num_preemptions:
                    raise
            except (PoolDied, DataLost) as error:  # also during a recovery
                failure = error
                self.num_failures += 1
                if 0 <= self.config.cluster.max_failures < self.num_failures:
                    raise

    def _iterate(self) -> None:
        self.timer = PhaseTimer()
        state, config = self.state, self.config.ppo
        batch = self.in_flight or self._generate(state.iteration)
        with self.timer.phase("generate"):
            self.pools.wait(batch.rollouts, "generate", watch_nodes=True)
        self._finish_checkpoint()  # actor and critic wrote it during the rollouts
        self.in_flight, self.untrained_batch = None, batch
        if config.async_rollouts and state.iteration + 1 < self.num_iterations:
            self.in_flight = self._generate(state.iteration + 1)

        with self.timer.phase("score"):
            scores = self.reward.call(Reward.score, batch.prompts, *batch.rollouts)
            values = self.critic.call(Critic.values, *batch.rollouts)
            logprobs = self.actor.call(Actor.logprobs, *batch.rollouts)
            reference = self._reference_logprobs(batch.rollouts)
            ptx_batch = self._ptx_batch(state.iteration)  # while the pools compute
            inputs = [list(batch.rollouts), scores, values, logprobs, reference]
            self.pools.wait([ref for refs in inputs for ref in refs], "score", watch_nodes=True)
            # fetched before the update: a death from now on may lose them
            rewards = [part.rewards for part in self.pools.get(scores, "score")]

        with self.timer.phase("update"):
            task = UpdateTask(
                iteration=state.iteration,
                weight_version=batch.weight_version,
                kl_coef=state.kl_coef,
                score_stats=state.score_stats,
                update_actor=state.iteration >= self.config.critic.warmup_iterations,
            )
            self.is_updating, self.untrained_batch = True, None
            critic_updates = self.critic.call(Critic.update, task, *inputs)
            actor_updates = self.actor.call(Actor.update, task, *inputs, ptx_batch)
            results = self.pools.get([*actor_updates, *critic_updates], "update")
            self.is_updating = False
        result: UpdateResult = results[0]
        state.iteration += 1
        state.score_stats = result.score_stats
        state.kl_coef = next_kl_coef(state.kl_coef, result.mean_kl, len(result.sample_ids), config)

        metrics = result.metrics | results[len(actor_updates)] | reward_metrics(rewards)
        metrics |= self.sync_metrics | self.timer.metrics(batch.num_prompts)
        tokens = metrics["rollout/response_tokens"] * batch.num_prompts
        self._log_metrics(metrics | usage_metrics(self.pools, batch.usage_refs, tokens))
        if config.audit:
            self.log.write_audit(batch.epoch, batch.iteration, result.sample_ids)
        if state.iteration % config.checkpoint_every == 0 or state.iteration == self.num_iterations:
            self._start_checkpoint()
        if state.iteration == 1 or state.iteration % self.config.report.every == 0:
            save_report_samples(self.pools, self.run, self.config, step=state.iteration)

    def _generate(self, iteration: int) -> RolloutRefs:
        """Start the rollouts of an iteration with the actor's current weights."""
        self._sync_weights()
        with self.timer.phase("prompts"):
            prompts = self.prompts.take(iteration)
            ref = self.pools.put(prompts)
        rollouts = self.rollout.call(Rollout.generate, ref, iteration, self.synced)
        usage = self.rollout.usage()
        epoch, num_prompts = prompts.epoch, len(prompts)
        return RolloutRefs(iteration, self.synced, epoch, ref, num_prompts, rollouts, usage)

    def _sync_weights(self) -> None:
        """Send the actor's weights to the rollout pool unless it already has them."""
        if self.synced != self.state.iteration:
            with self.timer.phase("sync"):
                self.sync_metrics = self.sync(self.state.iteration)
            self.synced = self.state.iteration

    def _reference_logprobs(self, rollouts: Refs) -> list[Any]:
        if self.reference is None:
            return self.actor.call(Actor.reference_logprobs, *rollouts)
        temperature = self.config.rollout.temperature
        return self.reference.call(Reference.logprobs, temperature, *rollouts)

    def _ptx_batch(self, iteration: int) -> Any:
        """Return a ref of the PPO-ptx batch; None without [ptx] and while the critic warms up."""
        if self.ptx is None or iteration < self.config.critic.warmup_iterations:
            return None
        return self.pools.put(self.ptx.take(iteration))

    def _recover(self, failure: PoolDied | DataLost) -> None:
        """Rebuild dead pools. Restart from the newest checkpoint if the actor or the critic died or
        was updating; otherwise repeat the batch."""
        if isinstance(failure, PoolDied):
            self.reporter.say(f"{failure}; the pool is rebuilt")
            self.rebuilt_roles.add(failure.role)  # also if it dies during the rebuild
            self.rebuilt_roles |= self.pools.rebuild(failure)
        else:
            self.reporter.say(f"{failure}; the batch is computed again")
        self.synced, self.in_flight, self.untrained_batch = NO_VERSION, None, None
        if self.is_updating or self.rebuilt_roles & {"actor", "critic"}:
            if self.is_updating or newest_checkpoint(self.run) is None:  # or to initial weights
                for pool in (self.actor, self.critic):
                    if pool.role not in self.rebuilt_roles:
                        self.rebuilt_roles.add(pool.role)
                        ranks = range(len(pool.workers))
                        self.pools.rebuild(PoolDied(pool.role, ranks, "must restart"))
            self._restart_from_checkpoint()
        self.is_updating = False
        self.rebuilt_roles.clear()

    def _move_off_draining_nodes(self, draining: NodesDraining) -> None:
        """Save a checkpoint, then move the pools off the draining nodes."""
        self.reporter.say(f"{draining}; saving a checkpoint, then moving the pools")
        self._finish_checkpoint()
        saved = newest_checkpoint(self.run)
        if self.state.iteration and (saved is None or saved[1].iteration < self.state.iteration):
            self.in_flight = self.untrained_batch or self.in_flight
            self._start_checkpoint()
            self._finish_checkpoint()
        self.pools.move(draining.roles)
        self.num_preemptions += 1
        self._restart_from_checkpoint()

    def _restart_from_checkpoint(self) -> None:
        """Start a new attempt from the newest checkpoint, or from the initial weights."""
        saved = newest_checkpoint(self.run)
        self.state = PPOState(kl_coef=self.config.ppo.kl_coef)
        self.synced = NO_VERSION
        self.in_flight: RolloutRefs | None = None
        self.untrained_batch: RolloutRefs | None = None  # generated, update not started
        self.pending_checkpoint = None
        if saved is not None:
            folder, self.state = saved
            loads = self.actor.call(Actor.load, (folder / "actor").url)
            loads += self.critic.call(Critic.load, (folder / "critic").url)
            self.pools.get(loads, "load checkpoint")
            sequences = read_sequences(folder)
            if sequences is not None:  # an earlier attempt sampled the next iteration's rollouts
                iteration, version = self.state.iteration, sequences.weight_version
                prompts = self.prompts.take(iteration)
                assert prompts.sample_ids == sequences.sample_ids
                ref, epoch, num_prompts = self.pools.put(prompts), prompts.epoch, len(prompts)
                rollouts = [self.pools.put(sequences)]
                self.in_flight = RolloutRefs(iteration, version, epoch, ref, num_prompts, rollouts)
        self.log.start_attempt(self.state.iteration, self.state.time_s)
        if self.log.attempt > 1:
            attempt, done = self.log.attempt, self.state.iteration
            self.reporter.say(f"attempt {attempt} continues after iteration {done}")

    def _start_checkpoint(self) -> None:
        """Start a checkpoint; actor and critic write it before their next call."""
        folder = self.run.checkpoint(self.state.iteration)
        folder.remove()  # leftovers of an attempt that died while writing
        self.state.time_s = self.log.writer.time_s
        self.log.writer.sync()
        actor = self.actor.call(Actor.save, (folder / "actor").url)
        critic = self.critic.call(Critic.save, (folder / "critic").url)
        refs = {"actor": actor, "critic": critic}
        self.pending_checkpoint = PendingCheckpoint(self.run, self.state, refs)

    def _finish_checkpoint(self) -> None:
        """Wait for the files of the pending checkpoint and commit it."""
        if self.pending_checkpoint is not None:
            batch, sequences = self.in_flight, None
            if batch is not None:
                sequences = join_sequences(self.pools.get(batch.rollouts, "generate"))
            keep = self.config.ppo.keep_checkpoints
            self.pending_checkpoint.finish(self.pools, in_flight=sequences, keep=keep)
            self.pending_checkpoint = None

    def _evaluate_and_diagnose(self) -> None:
        """Run the held-out evaluation if it is due. Raises Diverged if the diagnosis says so."""
        step = self.state.iteration
        latest = self.log.metrics_of(step)
        if self.heldout_eval.is_due(step) and "time/judge_s" not in latest:
            timer = PhaseTimer()
            self._sync_weights()
            metrics = self.heldout_eval.metrics()
            latest = latest | metrics | {"time/judge_s": timer.elapsed_s}
            self.log.write(step, latest)
        if self.log.history and (reason := diagnose(self.log.history, self.config.diagnosis)):
            raise Diverged(f"after iteration {step}: {reason}")
        if self.on_eval is not None and "time/judge_s" in latest:
            self._finish_checkpoint()
            self.log.writer.sync()
            self.on_eval(self.log.history)

    def _log_metrics(self, metrics: dict[str, float]) -> None:
        step = self.state.iteration
        self.log.write(step, metrics)
        summary = "  ".join(
            f"{label} {metrics[name]:{spec}}" for label, name, spec in CONSOLE_METRICS
        )
        due = step % self.config.ppo.log_every == 0 or step == self.num_iterations
        self.reporter.advance("iterations", step, self.num_iterations, summary, print_line=due)

"""Estimates how long a stage takes and what it costs, from FLOPs, memory traffic and links.

Every sequence counts with its maximum length, so real runs process more tokens per second.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medgpt.cluster.capacity import worker_bundle
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.stages import TrainStageConfig
from medgpt.planning.communication import LinkSpeeds, communication_seconds, step_collectives
from medgpt.planning.hardware import NodeType, PlannedCluster
from medgpt.planning.node_fit import workers_per_node
from medgpt.planning.node_launches import NodeLaunches
from medgpt.planning.planned_pools import PlannableConfig, PlannedPool
from medgpt.planning.speed import (
    compute_speed,
    decode_speed,
    forward_flops,
    train_flops,
)
from medgpt.runs import Run


@dataclass(frozen=True, kw_only=True)
class TimeAndCost:
    """Time and cost of a step, or of an iteration of PPO, and of the run."""

    tokens: float
    """Maximum tokens of a step or iteration."""
    seconds: Mapping[str, float]
    """Seconds by phase, at the assumed share of the peak; `step`, the last, is the total."""
    at_peak_s: float
    """Lower bound of the time of a step, in seconds."""
    total_tokens: float | None
    """Tokens of the run; None: unknown."""
    hours: float | None
    cost: float | None
    """In the currency of the cluster; None: unknown."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds["step"]


def estimate_time_and_cost(
    config: PlannableConfig,
    pools: Sequence[PlannedPool],
    cluster: PlannedCluster,
    launches: NodeLaunches,
    *,
    tokens: float | None,
    mfu: float,
) -> TimeAndCost:
    """Estimate the time and cost of a stage.

    Args:
        tokens: of the run; None: of its prepared data or `max_steps`, if known.
        mfu: assumed share of the peak FLOP/s.
    """
    placed = {
        pool.name: PlacedPool(pool, _slowest_node(pool, pools, cluster, launches)) for pool in pools
    }
    if isinstance(config, PPOStageConfig):
        length = config.data.max_length + config.rollout.max_new_tokens
        step_tokens = float(config.ppo.rollout_batch_size * length)
        expected, at_peak = (_ppo_iteration(config, placed, step_tokens, m) for m in (mfu, 1.0))
    else:
        step_tokens = float(config.train.global_batch_size * config.data.max_length)
        [pool] = placed.values()
        expected, at_peak = (_train_step(config, pool, step_tokens, m) for m in (mfu, 1.0))
    total = tokens if tokens is not None else _total_tokens(config, step_tokens)
    hours = None if total is None else total / step_tokens * expected["step"] / 3600
    price = launches.price_per_hour
    return TimeAndCost(
        tokens=step_tokens,
        seconds=expected,
        at_peak_s=at_peak["step"],
        total_tokens=total,
        hours=hours,
        cost=None if hours is None or price is None else hours * price,
    )


def _slowest_node(
    pool: PlannedPool, pools: Sequence[PlannedPool], cluster: PlannedCluster, launches: NodeLaunches
) -> NodeType:
    """Return the slowest node type that can hold the pool, among launched nodes if any can."""
    host = next((p for p in pools if p.name == pool.role.share_with), pool)
    matching = [
        node
        for node in cluster.workers
        if node.to_node_group().fits(worker_bundle(host.role), host.role.labels)
    ]
    candidates = [node for node in matching if launches.nodes.get(node.name)] or matching
    return min(candidates, key=lambda node: node.device.tflops)


@dataclass(frozen=True)
class PlacedPool:
    """A pool and the type of its nodes."""

    pool: PlannedPool
    node: NodeType

    @property
    def devices_per_worker(self) -> float:
        """CPU cores, or the share of a GPU, of a worker."""
        role = self.pool.role
        return min(1.0, role.gpus_per_worker) if self.pool.on_gpu else role.cpus_per_worker

    def forward_s(self, tokens: float, mfu: float) -> float:
        return self._compute_s(forward_flops(self.pool.model, self.pool.max_length), tokens, mfu)

    def train_s(self, tokens: float, mfu: float) -> float:
        """Return the seconds of forward and backward passes, without communication."""
        pool = self.pool
        checkpointing = pool.activation_checkpointing
        flops = train_flops(pool.model, pool.max_length, checkpointing=checkpointing)
        return self._compute_s(flops, tokens, mfu)

    def _compute_s(self, flops: float, tokens: float, mfu: float) -> float:
        device, devices = self.node.device, self.devices_per_worker
        speed = compute_speed(flops, device, devices=devices, mfu=mfu)
        return tokens / self.pool.role.num_workers / speed

    def communication_s(self, micro_batches: int) -> float:
        """Return the seconds of communication in an optimizer step."""
        pool, ranks = self.pool, self.pool.role.num_workers
        collectives = step_collectives(
            pool.model,
            zero_stage=pool.zero_stage,
            num_ranks=ranks,
            micro_batches=micro_batches,
            b=pool.bytes_per_weight,
        )
        links = LinkSpeeds(
            ranks_per_node=workers_per_node(self.node, pool),
            intra_node_gb_per_s=self.node.device.link_gb_per_s,
            network_gb_per_s=self.node.network_gb_per_s,
        )
        return communication_seconds(collectives, ranks, links)

    def combined_s(self, compute: float, exchange: float) -> float:
        """Return the time of both: only ZeRO-3 overlaps communication with compute."""
        return max(compute, exchange) if self.pool.zero_stage == 3 else compute + exchange


def _train_step(
    config: TrainStageConfig, placed: PlacedPool, tokens: float, mfu: float
) -> dict[str, float]:
    """Return the seconds of an optimizer step by phase."""
    train, ranks = config.train, placed.pool.role.num_workers
    micro_batches = -(-train.global_batch_size // (train.micro_batch_size * ranks))
    compute, exchange = placed.train_s(tokens, mfu), placed.communication_s(micro_batches)
    step = placed.combined_s(compute, exchange)
    return {"compute": compute, "exchange": exchange, "step": step}


def _ppo_iteration(
    config: PPOStageConfig, placed: Mapping[str, PlacedPool], tokens: float, mfu: float
) -> dict[str, float]:
    """Return the seconds of an iteration by phase: generate, score with all models in parallel,
    update actor and critic in parallel, sync the weights."""
    scoring = [p.forward_s(tokens, mfu) for name, p in placed.items() if name != "rollout"]
    updates = [_update_s(config, p, tokens, mfu) for p in placed.values() if p.pool.is_trained]
    phases = {
        "generate": _generate_s(config, placed["rollout"], mfu),
        "score": max(scoring),
        "update": max(updates),
        "sync": _sync_s(placed["actor"], placed["rollout"]),
    }
    learning = phases["score"] + phases["update"] + phases["sync"]
    generate = phases["generate"]
    overlapped = config.ppo.async_rollouts
    return {**phases, "step": max(generate, learning) if overlapped else generate + learning}


def _generate_s(config: PPOStageConfig, placed: PlacedPool, mfu: float) -> float:
    pool, response = placed.pool, config.rollout.max_new_tokens
    sequences_per_worker = -(-config.ppo.rollout_batch_size // pool.role.num_workers)
    speed = decode_speed(
        pool.model,
        placed.node.device,
        devices=placed.devices_per_worker,
        rows=min(max(1, config.rollout.batch_tokens // pool.max_length), sequences_per_worker),
        prompt=config.data.max_length,
        response=response,
        b=pool.bytes_per_weight,
        mfu=mfu,
    )
    return sequences_per_worker * response / speed


def _update_s(config: PPOStageConfig, placed: PlacedPool, tokens: float, mfu: float) -> float:
    ppo, pool = config.ppo, placed.pool
    compute = ppo.epochs * placed.train_s(tokens, mfu)
    steps = ppo.epochs * (ppo.rollout_batch_size // ppo.global_batch_size)
    tokens_per_worker = -(-ppo.global_batch_size // pool.role.num_workers) * pool.max_length
    micro_batches = -(-tokens_per_worker // max(ppo.micro_batch_tokens, pool.max_length))
    return placed.combined_s(compute, steps * placed.communication_s(micro_batches))


def _sync_s(actor: PlacedPool, rollout: PlacedPool) -> float:
    """Return the seconds to send all weights once over the slower node's network."""
    slower = min(actor.node.network_gb_per_s, rollout.node.network_gb_per_s)
    return actor.pool.bytes_per_weight * actor.pool.model.num_params / (slower * 1e9)


def _total_tokens(config: PlannableConfig, tokens_per_step: float) -> float | None:
    """Return the tokens of the run: of the plan of its data if the run directory is local and has
    one, at most those of its last step; None if both are unknown."""
    run = Run(config.run.dir) if "://" not in config.run.dir else None
    epochs = run.manifest.get("plan", {}).get("epochs") if run else None
    if isinstance(config, PPOStageConfig):
        limits = [config.ppo.max_iterations]
        if epochs is not None:
            num_rows = sum(epoch["num_rows"] for epoch in epochs)
            limits.append(-(-num_rows // config.ppo.rollout_batch_size))
        return min((n * tokens_per_step for n in limits if n is not None), default=None)
    totals = [] if epochs is None else [float(sum(epoch["num_tokens"] for epoch in epochs))]
    if config.train.max_steps is not None:
        totals.append(config.train.max_steps * tokens_per_step)
    return min(totals, default=None)

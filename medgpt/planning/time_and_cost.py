"""Estimates how long a stage takes and what it costs, from FLOPs, memory traffic and links.

Every sequence counts with its maximum length, so real runs process more tokens per second.
"""

from collections.abc import Callable, Mapping, Sequence
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
    TokenSpeed,
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
    node_types = {pool.name: _slowest_node(pool, pools, cluster, launches) for pool in pools}
    if isinstance(config, PPOStageConfig):
        phase_seconds, at_peak_s, tokens_per_step = _ppo_iteration(config, pools, node_types, mfu)
    else:
        phase_seconds, at_peak_s, tokens_per_step = _train_step(config, pools[0], node_types, mfu)
    total = tokens if tokens is not None else _total_tokens(config, tokens_per_step)
    hours = None if total is None else total / tokens_per_step * phase_seconds["step"] / 3600
    price = launches.price_per_hour
    return TimeAndCost(
        tokens=tokens_per_step,
        seconds=phase_seconds,
        at_peak_s=at_peak_s,
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


def devices_per_worker(pool: PlannedPool) -> float:
    """Return the CPU cores, or the share of a GPU, of a worker."""
    return min(1.0, pool.role.gpus_per_worker) if pool.on_gpu else pool.role.cpus_per_worker


def pool_links(pool: PlannedPool, node: NodeType) -> LinkSpeeds:
    return LinkSpeeds(
        ranks_per_node=workers_per_node(node, pool),
        intra_node_gb_per_s=node.device.link_gb_per_s,
        network_gb_per_s=node.network_gb_per_s,
    )


def communication_s(pool: PlannedPool, node: NodeType, micro_batches: int) -> float:
    """Return the seconds of communication in an optimizer step."""
    ranks = pool.role.num_workers
    collectives = step_collectives(
        pool.model,
        zero_stage=pool.zero_stage,
        num_ranks=ranks,
        micro_batches=micro_batches,
        b=pool.bytes_per_weight,
    )
    return communication_seconds(collectives, ranks, pool_links(pool, node))


def combined_s(pool: PlannedPool, compute: float, exchange: float) -> float:
    """Return the time of both: ZeRO-3 overlaps communication with compute, other stages do not."""
    return max(compute, exchange) if pool.zero_stage == 3 else compute + exchange


# ---- supervised stages ----


def _train_step(
    config: TrainStageConfig, pool: PlannedPool, node_types: Mapping[str, NodeType], mfu: float
) -> tuple[dict[str, float], float, float]:
    """Return (seconds by phase, seconds at the peak, tokens) of an optimizer step."""
    train, ranks, node = config.train, pool.role.num_workers, node_types[pool.name]
    tokens = float(train.global_batch_size * config.data.max_length)
    flops = train_flops(pool.model, pool.max_length, checkpointing=pool.activation_checkpointing)
    speed = compute_speed(flops, node.device, devices=devices_per_worker(pool), mfu=mfu)
    micro_batches = -(-train.global_batch_size // (train.micro_batch_size * ranks))
    exchange = communication_s(pool, node, micro_batches)
    compute, at_peak = (tokens / ranks / s for s in (speed.expected, speed.at_peak))
    step = combined_s(pool, compute, exchange)
    phase_seconds = {"compute": compute, "exchange": exchange, "step": step}
    return phase_seconds, combined_s(pool, at_peak, exchange), tokens


# ---- PPO ----


def _ppo_iteration(
    config: PPOStageConfig,
    pools: Sequence[PlannedPool],
    node_types: Mapping[str, NodeType],
    mfu: float,
) -> tuple[dict[str, float], float, float]:
    """Return (seconds by phase, seconds at the peak, tokens) of an iteration: generate, score with
    all models in parallel, update actor and critic in parallel, sync the weights."""
    sequences = config.ppo.rollout_batch_size
    length = config.data.max_length + config.rollout.max_new_tokens
    by_name = {pool.name: pool for pool in pools}
    expected, at_peak = (
        _ppo_phases(config, by_name, node_types, sequences * length, mfu, peak=peak)
        for peak in (False, True)
    )
    for phases in (expected, at_peak):
        learning = phases["score"] + phases["update"] + phases["sync"]
        overlapped = config.ppo.async_rollouts
        generate = phases["generate"]
        phases["step"] = max(generate, learning) if overlapped else generate + learning
    return expected, at_peak["step"], float(sequences * length)


def _ppo_phases(
    config: PPOStageConfig,
    pools: Mapping[str, PlannedPool],
    node_types: Mapping[str, NodeType],
    tokens: int,
    mfu: float,
    *,
    peak: bool,
) -> dict[str, float]:
    def seconds_for(pool: PlannedPool, flops: float) -> float:
        speed = compute_speed(
            flops, node_types[pool.name].device, devices=devices_per_worker(pool), mfu=mfu
        )
        return tokens / pool.role.num_workers / (speed.at_peak if peak else speed.expected)

    scoring = [
        seconds_for(p, forward_flops(p.model, p.max_length))
        for p in pools.values()
        if p.name != "rollout"
    ]
    return {
        "generate": _generate_s(config, pools["rollout"], node_types["rollout"], mfu, peak=peak),
        "score": max(scoring),
        "update": max(
            _update_s(config, p, node_types[p.name], seconds_for)
            for p in pools.values()
            if p.is_trained
        ),
        "sync": _sync_s(pools["actor"], node_types),
    }


def _generate_s(
    config: PPOStageConfig, pool: PlannedPool, node: NodeType, mfu: float, *, peak: bool
) -> float:
    rows = max(1, config.rollout.batch_tokens // pool.max_length)
    sequences_per_worker = -(-config.ppo.rollout_batch_size // pool.role.num_workers)
    speed: TokenSpeed = decode_speed(
        pool.model,
        node.device,
        devices=devices_per_worker(pool),
        rows=min(rows, sequences_per_worker),
        prompt=config.data.max_length,
        response=config.rollout.max_new_tokens,
        b=pool.bytes_per_weight,
        mfu=mfu,
    )
    return (
        sequences_per_worker
        * config.rollout.max_new_tokens
        / (speed.at_peak if peak else speed.expected)
    )


def _update_s(
    config: PPOStageConfig,
    pool: PlannedPool,
    node: NodeType,
    seconds_for: Callable[[PlannedPool, float], float],
) -> float:
    ppo = config.ppo
    compute = ppo.epochs * seconds_for(
        pool, train_flops(pool.model, pool.max_length, checkpointing=pool.activation_checkpointing)
    )
    steps = ppo.epochs * (ppo.rollout_batch_size // ppo.global_batch_size)
    tokens_per_worker = -(-ppo.global_batch_size // pool.role.num_workers) * pool.max_length
    exchange = steps * communication_s(
        pool, node, -(-tokens_per_worker // max(ppo.micro_batch_tokens, pool.max_length))
    )
    return combined_s(pool, compute, exchange)


def _sync_s(actor: PlannedPool, node_types: Mapping[str, NodeType]) -> float:
    """Return the seconds to send all weights once over the slower node's network."""
    slower = min(node_types[name].network_gb_per_s for name in ("actor", "rollout"))
    return actor.bytes_per_weight * actor.model.num_params / (slower * 1e9)


# ---- tokens of the run ----


def _total_tokens(config: PlannableConfig, tokens_per_step: float) -> float | None:
    """Return the tokens of the run: of the plan of its data if the run directory is local and has
    one, at most those of its last step; None if both are unknown."""
    run = Run(config.run.dir) if "://" not in config.run.dir else None
    epochs = run.manifest.get("plan", {}).get("epochs") if run else None
    if isinstance(config, PPOStageConfig):
        size, max_iterations = config.ppo.rollout_batch_size, config.ppo.max_iterations
        num_rows = None if epochs is None else sum(epoch["num_rows"] for epoch in epochs)
        iterations = [
            n
            for n in (max_iterations, None if num_rows is None else -(-num_rows // size))
            if n is not None
        ]
        return min(iterations) * tokens_per_step if iterations else None
    candidates = [] if epochs is None else [float(sum(epoch["num_tokens"] for epoch in epochs))]
    if config.train.max_steps is not None:
        candidates.append(config.train.max_steps * tokens_per_step)
    return min(candidates) if candidates else None

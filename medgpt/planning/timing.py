"""How long a stage takes and what it costs: from operations, memory and links, not measured.

Every piece counts as long as the config allows, so true tokens per second are higher.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from medgpt.cluster.capacity import bundle
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.stages import TrainStageConfig
from medgpt.planning.fitting import workers_on
from medgpt.planning.hardware import Cluster, NodeType
from medgpt.planning.needs import Pool, StageConfig
from medgpt.planning.placing import Started
from medgpt.planning.speed import (
    Speed,
    compute_speed,
    decode_speed,
    forward_flops,
    train_flops,
)
from medgpt.planning.traffic import Links, messages, seconds
from medgpt.runs import Run


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Of a step, or of an iteration of PPO."""

    tokens: float
    """At most, of a step or iteration."""
    seconds: Mapping[str, float]
    """By phase, at the assumed share of the peak; the last, `step`, is the whole."""
    at_peak_s: float
    """No step takes less."""
    total_tokens: float | None
    """Of the run."""
    hours: float | None
    cost: float | None
    """In the cluster's currency."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds["step"]


def timing(
    config: StageConfig,
    pools: Sequence[Pool],
    cluster: Cluster,
    started: Started,
    *,
    tokens: float | None,
    mfu: float,
) -> Timing:
    """Args: tokens: of the run; None: of its prepared data, or of `max_steps`, else not told."""
    places = {pool.name: _place(pool, pools, cluster, started) for pool in pools}
    if isinstance(config, PPOStageConfig):
        found, slowest, of_step = _iteration(config, pools, places, mfu)
    else:
        found, slowest, of_step = _step(config, pools[0], places, mfu)
    total = tokens if tokens is not None else _prepared(config, of_step)
    hours = None if total is None else total / of_step * found["step"] / 3600
    price = started.price_per_hour
    return Timing(
        tokens=of_step,
        seconds=found,
        at_peak_s=slowest,
        total_tokens=total,
        hours=hours,
        cost=None if hours is None or price is None else hours * price,
    )


def _place(pool: Pool, pools: Sequence[Pool], cluster: Cluster, started: Started) -> NodeType:
    """The slowest node type that may hold the pool, among those that are started."""
    host = next((p for p in pools if p.name == pool.role.share_with), pool)
    fitting = [
        node
        for node in cluster.workers
        if node.as_nodes().fits(bundle(host.role), host.role.labels)
    ]
    used = [node for node in fitting if started.nodes.get(node.name)] or fitting
    return min(used, key=lambda node: node.device.tflops)


def devices_of(pool: Pool) -> float:
    """Cores, or the part of a GPU, that a worker computes with."""
    return min(1.0, pool.role.gpus_per_worker) if pool.on_gpu else pool.role.cpus_per_worker


def links_of(pool: Pool, node: NodeType) -> Links:
    return Links(
        ranks_per_node=workers_on(node, pool),
        inside_gb_per_s=node.device.link_gb_per_s,
        network_gb_per_s=node.network_gb_per_s,
    )


def exchange_s(pool: Pool, node: NodeType, micro_batches: int) -> float:
    """Seconds that a pool that trains communicates in an optimizer step."""
    ranks = pool.role.num_workers
    found = messages(
        pool.model, zero_stage=pool.stage, num_ranks=ranks, micro_batches=micro_batches, b=pool.b
    )
    return seconds(found, ranks, links_of(pool, node))


def together_s(pool: Pool, compute: float, exchange: float) -> float:
    """ZeRO-3 communicates while it computes; the other stages, as medgpt sets them up, do not."""
    return max(compute, exchange) if pool.stage == 3 else compute + exchange


# ---- supervised stages ----


def _step(
    config: TrainStageConfig, pool: Pool, places: Mapping[str, NodeType], mfu: float
) -> tuple[dict[str, float], float, float]:
    """(seconds by phase, seconds at the peak, tokens)"""
    train, ranks, node = config.train, pool.role.num_workers, places[pool.name]
    tokens = float(train.global_batch_size * config.data.max_length)
    flops = train_flops(pool.model, pool.length, checkpointing=pool.checkpointing)
    speed = compute_speed(flops, node.device, devices=devices_of(pool), mfu=mfu)
    micro_batches = -(-train.global_batch_size // (train.micro_batch_size * ranks))
    exchange = exchange_s(pool, node, micro_batches)
    compute, at_peak = (tokens / ranks / s for s in (speed.expected, speed.at_peak))
    step = together_s(pool, compute, exchange)
    found = {"compute": compute, "exchange": exchange, "step": step}
    return found, together_s(pool, at_peak, exchange), tokens


# ---- PPO ----


def _iteration(
    config: PPOStageConfig, pools: Sequence[Pool], places: Mapping[str, NodeType], mfu: float
) -> tuple[dict[str, float], float, float]:
    """Generate; score by all models at once; actor and critic learn at once; weights are sent."""
    sequences = config.ppo.rollout_batch_size
    length = config.data.max_length + config.rollout.max_new_tokens
    by_name = {pool.name: pool for pool in pools}
    expected, at_peak = (
        _phases(config, by_name, places, sequences * length, mfu, peak=peak)
        for peak in (False, True)
    )
    for found in (expected, at_peak):
        learning = found["score"] + found["update"] + found["sync"]
        overlapped = config.ppo.async_rollouts
        generate = found["generate"]
        found["step"] = max(generate, learning) if overlapped else generate + learning
    return expected, at_peak["step"], float(sequences * length)


def _phases(
    config: PPOStageConfig,
    pools: Mapping[str, Pool],
    places: Mapping[str, NodeType],
    tokens: int,
    mfu: float,
    *,
    peak: bool,
) -> dict[str, float]:
    def spent(pool: Pool, flops: float) -> float:
        speed = compute_speed(flops, places[pool.name].device, devices=devices_of(pool), mfu=mfu)
        return tokens / pool.role.num_workers / (speed.at_peak if peak else speed.expected)

    scoring = [
        spent(p, forward_flops(p.model, p.length)) for p in pools.values() if p.name != "rollout"
    ]
    return {
        "generate": _generate_s(config, pools["rollout"], places["rollout"], mfu, peak=peak),
        "score": max(scoring),
        "update": max(
            _update_s(config, p, places[p.name], spent) for p in pools.values() if p.trains
        ),
        "sync": _sync_s(pools["actor"], places),
    }


def _generate_s(
    config: PPOStageConfig, pool: Pool, node: NodeType, mfu: float, *, peak: bool
) -> float:
    rows = max(1, config.rollout.batch_tokens // pool.length)
    mine = -(-config.ppo.rollout_batch_size // pool.role.num_workers)
    speed: Speed = decode_speed(
        pool.model,
        node.device,
        devices=devices_of(pool),
        rows=min(rows, mine),
        prompt=config.data.max_length,
        response=config.rollout.max_new_tokens,
        b=pool.b,
        mfu=mfu,
    )
    return mine * config.rollout.max_new_tokens / (speed.at_peak if peak else speed.expected)


def _update_s(
    config: PPOStageConfig, pool: Pool, node: NodeType, spent: Callable[[Pool, float], float]
) -> float:
    ppo = config.ppo
    compute = ppo.epochs * spent(
        pool, train_flops(pool.model, pool.length, checkpointing=pool.checkpointing)
    )
    steps = ppo.epochs * (ppo.rollout_batch_size // ppo.global_batch_size)
    share = -(-ppo.global_batch_size // pool.role.num_workers) * pool.length
    exchange = steps * exchange_s(pool, node, -(-share // max(ppo.micro_batch_tokens, pool.length)))
    return together_s(pool, compute, exchange)


def _sync_s(actor: Pool, places: Mapping[str, NodeType]) -> float:
    """All weights once over the slower of the two nodes' networks."""
    slower = min(places[name].network_gb_per_s for name in ("actor", "rollout"))
    return actor.b * actor.model.num_params / (slower * 1e9)


# ---- how much there is to do ----


def _prepared(config: StageConfig, of_step: float) -> float | None:
    """Tokens of the run: of the plan of its data, if the run directory is on this machine and has
    one, else of its last step."""
    run = Run(config.run.dir) if "://" not in config.run.dir else None
    planned = run.manifest.get("plan", {}).get("epochs") if run else None
    if isinstance(config, PPOStageConfig):
        size, most = config.ppo.rollout_batch_size, config.ppo.max_iterations
        rows = None if planned is None else sum(epoch["num_rows"] for epoch in planned)
        iterations = [
            n for n in (most, None if rows is None else -(-rows // size)) if n is not None
        ]
        return min(iterations) * of_step if iterations else None
    found = [] if planned is None else [float(sum(epoch["num_tokens"] for epoch in planned))]
    if config.train.max_steps is not None:
        found.append(config.train.max_steps * of_step)
    return min(found) if found else None

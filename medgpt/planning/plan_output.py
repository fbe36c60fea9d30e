"""Output of a plan: tables on the console, or JSON."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from medgpt.planning.memory import GIB
from medgpt.planning.node_fit import USABLE_SHARE, PoolFit
from medgpt.planning.plan import StagePlan
from medgpt.planning.planned_pools import PlannedPool

MEMORY_KINDS = (  # in the order of the columns
    *("weights", "gradients", "optimizer", "activations", "logits", "cache", "buckets"),
    *("snapshot", "reference", "freed", "runtime"),
)


def print_plan(plan: StagePlan, mfu: float) -> None:
    """Print the plan: memory by pool, other engine settings, nodes, time and cost, assumptions."""
    console = Console()
    for table in (_pools_table(plan), _variants_table(plan)):
        console.print(table)
    for line in (
        _describe_nodes(plan),
        _describe_time(plan, mfu),
        *(f"assumed: {note}" for note in plan.notes),
    ):
        print(line)


def _pools_table(plan: StagePlan) -> Table:
    used = [
        k
        for k in MEMORY_KINDS
        if any(pool.memory.worst_phase.bytes_by_kind.get(k) for pool in plan.pools)
    ]
    table = Table(title="Peak memory of a worker, GiB", title_justify="left")
    for column in ("pool", "workers", "parameters", "trained", *used, "all", "host", "fits"):
        table.add_column(column, justify="left" if column in ("pool", "fits") else "right")
    for pool in plan.pools:
        bytes_by_kind = pool.memory.worst_phase.bytes_by_kind
        table.add_row(
            f"{pool.name} ({pool.memory.worst_phase.name})",
            str(pool.role.num_workers),
            _format_count(pool.model.num_params),
            _format_count(pool.model.num_trainable) if pool.is_trained else "",
            *(
                f"{bytes_by_kind[kind] / GIB:.1f}" if bytes_by_kind.get(kind) else ""
                for kind in used
            ),
            f"{pool.memory.worst_phase.total_bytes / GIB:.1f}",
            f"{pool.memory.host_bytes / GIB:.1f}" if pool.memory.host_bytes else "",
            _fitting_nodes(plan.fits[pool.name])
            if pool.name in plan.fits
            else f"with {pool.role.share_with}",
        )
    return table


def _variants_table(plan: StagePlan) -> Table:
    table = Table(
        title=f"Engine settings: GiB per worker, nodes where it fits in {USABLE_SHARE:.0%}",
        title_justify="left",
    )
    names = [name for name in plan.fits if plan.variants and name in plan.variants[0].fits]
    for column in ("ZeRO", "offload", "checkpointing"):
        table.add_column(column)
    for name in names:
        table.add_column(name, justify="right")
        table.add_column("fits")
    for variant in plan.variants:
        cells = [
            cell
            for name in names
            for cell in (_format_gb(variant.fits[name]), _fitting_nodes(variant.fits[name]))
        ]
        table.add_row(
            str(variant.zero_stage),
            _yes_or_blank(variant.offload),
            _yes_or_blank(variant.checkpointing),
            *cells,
        )
    return table


def _describe_nodes(plan: StagePlan) -> str:
    types = {node.name: node for node in (plan.cluster.head, *plan.cluster.workers)}
    nodes = ", ".join(
        f"{count} x {name} ({types[name].device_name})"
        for name, count in plan.launches.nodes.items()
    )
    price = plan.launches.price_per_hour
    cost = "price unknown" if price is None else f"{price:,.2f} {plan.cluster.currency} an hour"
    return f"the autoscaler starts {nodes}: {cost}"


def _describe_time(plan: StagePlan, mfu: float) -> str:
    estimate = plan.time_and_cost
    parts = ", ".join(
        f"{name} {value:.3g} s" for name, value in estimate.seconds.items() if name != "step"
    )
    lines = [
        f"at most {estimate.tokens:,.0f} tokens per step in {estimate.seconds['step']:.3g} s "
        f"({parts}), {estimate.tokens_per_s:,.0f} tokens/s at an assumed {mfu:.0%} of the peak; at "
        f"least {estimate.at_peak_s:.3g} s"
    ]
    if estimate.total_tokens is None:
        lines.append("total time unknown; set --tokens, or prepare the data of the run first")
    else:
        assert estimate.hours is not None
        cost = "" if estimate.cost is None else f", {estimate.cost:,.0f} {plan.cluster.currency}"
        lines.append(f"{estimate.total_tokens:,.0f} tokens: {estimate.hours:,.2f} hours{cost}")
    return "\n".join(lines)


def _fitting_nodes(fit: PoolFit) -> str:
    """Return the node types with enough memory, with `?` if the host memory is unknown."""
    names = [f"{r.node}{'' if r.fits else '?'}" for r in fit.rooms.values() if r.fits is not False]
    return ", ".join(names) or "none"


def _format_gb(fit: PoolFit) -> str:
    host = f" + {fit.host_gb:.1f}" if fit.host_gb else ""
    return f"{fit.device_gb:.1f}{host}"


def _format_count(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def _yes_or_blank(value: bool) -> str:
    return "yes" if value else ""


def plan_to_json(plan: StagePlan, mfu: float) -> dict[str, Any]:
    """Return all numbers of a plan; keys end in their units."""
    estimate = plan.time_and_cost
    return {
        "stage": plan.stage,
        "pools": {pool.name: _pool_json(pool) for pool in plan.pools},
        "fits": {name: asdict(fit) for name, fit in plan.fits.items()},
        "variants": [asdict(variant) for variant in plan.variants],
        "nodes": dict(plan.launches.nodes),
        "price_per_hour": plan.launches.price_per_hour,
        "currency": plan.cluster.currency,
        "mfu": mfu,
        "step": {
            "tokens": estimate.tokens,
            "seconds": dict(estimate.seconds),
            "at_peak_s": estimate.at_peak_s,
            "tokens_per_s": estimate.tokens_per_s,
        },
        "tokens": estimate.total_tokens,
        "hours": estimate.hours,
        "cost": estimate.cost,
        "assumed": list(plan.notes),
    }


def _pool_json(pool: PlannedPool) -> dict[str, Any]:
    device = pool.memory.worst_phase
    return {
        "workers": pool.role.num_workers,
        "parameters": pool.model.num_params,
        "trained": pool.model.num_trainable if pool.is_trained else 0,
        "bytes_per_weight": pool.bytes_per_weight,
        "zero_stage": pool.zero_stage,
        "worst_phase": device.name,
        "device_gb": device.total_bytes / GIB,
        "held_gb": dict(_nonzero_gb(device.bytes_by_kind)),
        "host_gb": pool.memory.host_bytes / GIB,
    }


def _nonzero_gb(bytes_by_kind: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    for kind, size in bytes_by_kind.items():
        if size:
            yield kind, size / GIB

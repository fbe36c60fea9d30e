"""Output of a plan: tables on the console, or JSON."""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from medgpt.models.model_shapes import ModelShape
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
    console.print(_pools_table(plan))
    console.print(_variants_table(plan))
    notes = (f"assumed: {note}" for note in plan.notes)
    print(_describe_nodes(plan), _describe_time(plan, mfu), *notes, sep="\n")


def _pools_table(plan: StagePlan) -> Table:
    phases = [pool.memory.worst_phase for pool in plan.pools]
    used = [kind for kind in MEMORY_KINDS if any(p.bytes_by_kind.get(kind) for p in phases)]
    table = Table(title="Peak memory of a worker, GiB", title_justify="left")
    for column in ("pool", "workers", "parameters", "trained", *used, "all", "host", "fits"):
        table.add_column(column, justify="left" if column in ("pool", "fits") else "right")
    for pool, phase in zip(plan.pools, phases, strict=True):
        fit = plan.fits.get(pool.name)
        sizes = [phase.bytes_by_kind.get(kind, 0.0) for kind in used]
        table.add_row(
            f"{pool.name} ({phase.name})",
            str(pool.role.num_workers),
            _format_parameters(pool.model),
            _format_count(pool.model.num_trainable) if pool.is_trained else "",
            *(f"{size / GIB:.1f}" if size else "" for size in sizes),
            f"{phase.total_bytes / GIB:.1f}",
            f"{pool.memory.host_bytes / GIB:.1f}" if pool.memory.host_bytes else "",
            f"with {pool.role.share_with}" if fit is None else _fitting_nodes(fit),
        )
    return table


def _variants_table(plan: StagePlan) -> Table:
    title = f"Engine settings: GiB per worker, nodes where it fits in {USABLE_SHARE:.0%}"
    table = Table(title=title, title_justify="left")
    names = [name for name in plan.fits if plan.variants and name in plan.variants[0].fits]
    for column in ("ZeRO", "offload", "checkpointing"):
        table.add_column(column)
    for name in names:
        table.add_column(name, justify="right")
        table.add_column("fits")
    for variant in plan.variants:
        flags = ("yes" if flag else "" for flag in (variant.offload, variant.checkpointing))
        fits = [variant.fits[name] for name in names]
        cells = [cell for fit in fits for cell in (_format_gb(fit), _fitting_nodes(fit))]
        table.add_row(str(variant.zero_stage), *flags, *cells)
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


def _format_parameters(model: ModelShape) -> str:
    """Return the number of parameters, and of those that one token uses if they are fewer."""
    count = _format_count(model.num_params)
    if model.num_active == model.num_params:
        return count
    return f"{count}, {_format_count(model.num_active)} active"


def _format_count(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


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
    phase = pool.memory.worst_phase
    return {
        "workers": pool.role.num_workers,
        "parameters": pool.model.num_params,
        "active_parameters": pool.model.num_active,
        "trained": pool.model.num_trainable if pool.is_trained else 0,
        "bytes_per_weight": pool.bytes_per_weight,
        "zero_stage": pool.zero_stage,
        "worst_phase": phase.name,
        "device_gb": phase.total_bytes / GIB,
        "held_gb": {kind: size / GIB for kind, size in phase.bytes_by_kind.items() if size},
        "host_gb": pool.memory.host_bytes / GIB,
    }

"""A plan as tables on the console, or as JSON."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from medgpt.planning.fitting import USABLE, Fit
from medgpt.planning.memory import GIB
from medgpt.planning.needs import Pool
from medgpt.planning.plan import Plan

KINDS = (  # as they are shown
    *("weights", "gradients", "optimizer", "activations", "logits", "cache", "buckets"),
    *("snapshot", "reference", "freed", "runtime"),
)


def show(plan: Plan, mfu: float) -> None:
    """Print the plan: memory by pool, other engines, nodes, time and cost, assumptions."""
    console = Console()
    for table in (_pools(plan), _variants(plan)):
        console.print(table)
    for line in (_nodes(plan), _time(plan, mfu), *(f"assumed: {note}" for note in plan.notes)):
        print(line)


def _pools(plan: Plan) -> Table:
    used = [k for k in KINDS if any(pool.memory.device.held.get(k) for pool in plan.pools)]
    table = Table(title="Memory of a worker at its worst, GiB", title_justify="left")
    for column in ("pool", "workers", "parameters", "trained", *used, "all", "host", "fits"):
        table.add_column(column, justify="left" if column in ("pool", "fits") else "right")
    for pool in plan.pools:
        held = pool.memory.device.held
        table.add_row(
            f"{pool.name} ({pool.memory.device.name})",
            str(pool.role.num_workers),
            _millions(pool.model.num_params),
            _millions(pool.model.num_trainable) if pool.trains else "",
            *(f"{held[kind] / GIB:.1f}" if held.get(kind) else "" for kind in used),
            f"{pool.memory.device.total / GIB:.1f}",
            f"{pool.memory.host / GIB:.1f}" if pool.memory.host else "",
            _fitting(plan.fits[pool.name])
            if pool.name in plan.fits
            else f"with {pool.role.share_with}",
        )
    return table


def _variants(plan: Plan) -> Table:
    table = Table(
        title=f"Other engines: GiB of a worker, and where {USABLE:.0%} of the memory hold it",
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
            for cell in (_gigabytes(variant.fits[name]), _fitting(variant.fits[name]))
        ]
        table.add_row(
            str(variant.zero_stage), _yes(variant.offload), _yes(variant.checkpointing), *cells
        )
    return table


def _nodes(plan: Plan) -> str:
    types = {node.name: node for node in (plan.cluster.head, *plan.cluster.workers)}
    nodes = ", ".join(
        f"{count} x {name} ({types[name].device_name})"
        for name, count in plan.started.nodes.items()
    )
    price = plan.started.price_per_hour
    cost = "price not known" if price is None else f"{price:,.2f} {plan.cluster.currency} an hour"
    return f"the autoscaler starts {nodes}: {cost}"


def _time(plan: Plan, mfu: float) -> str:
    timing = plan.timing
    parts = ", ".join(
        f"{name} {value:.3g} s" for name, value in timing.seconds.items() if name != "step"
    )
    words = [
        f"{timing.tokens:,.0f} tokens a step at most: {timing.seconds['step']:.3g} s ({parts}), "
        f"{timing.tokens_per_s:,.0f} tokens/s at an assumed {mfu:.0%} of the peak; no less than "
        f"{timing.at_peak_s:.3g} s"
    ]
    if timing.total_tokens is None:
        words.append("how long it takes is not known: give --tokens, or prepare the run")
    else:
        assert timing.hours is not None
        cost = "" if timing.cost is None else f", {timing.cost:,.0f} {plan.cluster.currency}"
        words.append(f"{timing.total_tokens:,.0f} tokens: {timing.hours:,.2f} hours{cost}")
    return "\n".join(words)


def _fitting(fit: Fit) -> str:
    """Node types with room, `?` where a host's memory is not known."""
    named = [f"{r.node}{'' if r.fits else '?'}" for r in fit.rooms.values() if r.fits is not False]
    return ", ".join(named) or "none"


def _gigabytes(fit: Fit) -> str:
    host = f" + {fit.host_gb:.1f}" if fit.host_gb else ""
    return f"{fit.device_gb:.1f}{host}"


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def _yes(value: bool) -> str:
    return "yes" if value else ""


def to_json(plan: Plan, mfu: float) -> dict[str, Any]:
    """All numbers of a plan; keys end in their units."""
    timing = plan.timing
    return {
        "stage": plan.stage,
        "pools": {pool.name: _pool_json(pool) for pool in plan.pools},
        "fits": {name: asdict(fit) for name, fit in plan.fits.items()},
        "variants": [asdict(variant) for variant in plan.variants],
        "nodes": dict(plan.started.nodes),
        "price_per_hour": plan.started.price_per_hour,
        "currency": plan.cluster.currency,
        "mfu": mfu,
        "step": {
            "tokens": timing.tokens,
            "seconds": dict(timing.seconds),
            "at_peak_s": timing.at_peak_s,
            "tokens_per_s": timing.tokens_per_s,
        },
        "tokens": timing.total_tokens,
        "hours": timing.hours,
        "cost": timing.cost,
        "assumed": list(plan.notes),
    }


def _pool_json(pool: Pool) -> dict[str, Any]:
    device = pool.memory.device
    return {
        "workers": pool.role.num_workers,
        "parameters": pool.model.num_params,
        "trained": pool.model.num_trainable if pool.trains else 0,
        "bytes_per_weight": pool.b,
        "zero_stage": pool.stage,
        "worst_phase": device.name,
        "device_gb": device.total / GIB,
        "held_gb": dict(_in_gb(device.held)),
        "host_gb": pool.memory.host / GIB,
    }


def _in_gb(held: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    for kind, size in held.items():
        if size:
            yield kind, size / GIB

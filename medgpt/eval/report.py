"""report.html of a run: one self-contained page with curves, counts, config and samples."""

import io
from typing import Any

import matplotlib
import tomli_w
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure

from medgpt.runs import Run

matplotlib.use("svg")
CURVES = (  # title, unit, metric -> label
    ("Loss", "nats per target token", {"train/loss": "train", "validation/loss": "validation"}),
    ("Throughput", "tokens per second", {"train/tokens_per_s": "all workers"}),
    ("Gradient norm", "", {"train/grad_norm": "before clipping"}),
    ("Learning rate", "", {"train/learning_rate": "learning rate"}),
)


def write_report(run: Run) -> None:
    """Write report.html from what the run directory holds."""
    metrics = run.metrics()
    samples = run.folder.read_json("samples.json") if run.folder.exists("samples.json") else []
    page = Environment(loader=PackageLoader("medgpt.eval"), autoescape=True).get_template(
        "report.html.jinja"
    )
    html = page.render(
        name=run.folder.url.rsplit("/", 1)[-1],
        manifest=run.manifest,
        config=tomli_w.dumps(run.config),
        curves=[(title, _curve(metrics, unit, lines)) for title, unit, lines in CURVES],
        facts=_facts(metrics),
        samples=samples,
    )
    run.folder.write_text("report.html", html)


def _curve(metrics: list[dict[str, Any]], unit: str, lines: dict[str, str]) -> str:
    """An SVG of metrics over steps."""
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, label in lines.items():
        points = [(line["step"], line[name]) for line in metrics if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 40 else "")
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    return svg.getvalue()[svg.getvalue().index("<svg") :]


def _facts(metrics: list[dict[str, Any]]) -> dict[str, str]:
    """The numbers a reader looks for first."""
    validation = [line["validation/loss"] for line in metrics if "validation/loss" in line]
    speed = sorted(line["train/tokens_per_s"] for line in metrics if "train/tokens_per_s" in line)
    trained = [line for line in metrics if "train/loss" in line]
    facts: dict[str, str] = {}
    if trained:
        facts["Steps"] = f"{trained[-1]['step']:,}"
        facts["Training time"] = f"{metrics[-1]['time_s'] / 60:.1f} min"
        facts["Tokens"] = f"{sum(line['train/tokens'] for line in trained):,.0f}"
        facts["Tokens per second (median)"] = f"{speed[len(speed) // 2]:,.0f}"
        facts["Last training loss"] = f"{trained[-1]['train/loss']:.4f}"
    if validation:
        facts["Validation loss, first to last"] = f"{validation[0]:.4f} to {validation[-1]:.4f}"
        facts["Best validation loss"] = f"{min(validation):.4f}"
    return facts

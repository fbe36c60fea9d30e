"""report.html of a run: one self-contained page with curves, counts, config and samples.

It shows metrics and generated text, never rows of the data.
"""

import io
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.typing import RcKeyType

from medgpt.reports.scores import (
    BLEU_EQUIVALENCE_MARGIN,
    EQUIVALENCE_MARGIN,
    classify_change,
)
from medgpt.runs import Run
from medgpt.train.reward_eval import REWARD_EVAL_FILE

LOSS = "Loss"
CURVES = (  # title, unit, metric -> label
    (LOSS, "nats per target token", {"train/loss": "train", "validation/loss": "validation"}),
    (
        "Pairs in the right order",
        "share",
        {
            "reward/accuracy": "train",
            "dpo/accuracy": "train",
            "validation/accuracy": "validation",
        },
    ),
    (
        "Reward against the reference",
        "nats times beta",
        {"dpo/chosen": "better answers", "dpo/rejected": "worse answers"},
    ),
    ("Throughput", "tokens per second", {"train/tokens_per_s": "all workers"}),
    ("Gradient norm", "before clipping", {"train/grad_norm": "gradient norm"}),
    ("Learning rate", "", {"train/learning_rate": "learning rate"}),
)
NO_METADATA = ("Date", "Creator", "Format", "Type")
MAX_POINTS = 1000  # per line; longer lines are averaged in groups
MAX_MARKED_POINTS = 40  # a line with at most this many points marks each of them
STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",  # write text as text, not as paths
    "svg.hashsalt": "medgpt",  # make the SVG reproducible
    "axes.spines.top": False,
    "axes.spines.right": False,
}

Metrics = list[dict[str, Any]]


def write_run_report(run: Run) -> None:
    """Write report.html from the files of the run directory."""
    metrics = run.metrics()
    samples = run.folder.read_json("samples.json") if run.folder.exists("samples.json") else []
    reward_eval = (
        run.folder.read_json(REWARD_EVAL_FILE) if run.folder.exists(REWARD_EVAL_FILE) else None
    )
    units = {LOSS: "nats per prompt"} if reward_eval else {}
    curves = [
        (title, plot_curve(metrics, units.get(title, unit), lines)) for title, unit, lines in CURVES
    ]
    if reward_eval and reward_eval["pairs"]:
        curves.insert(0, ("Held-out score margins", _plot_margin_histogram(reward_eval["leads"])))
    write_page(
        run,
        "report.html.jinja",
        curves=[(title, svg) for title, svg in curves if svg],
        key_numbers=_key_numbers(metrics),
        samples=samples,
        reward_eval=reward_eval,
    )


def write_page(run: Run, template: str, **values: Any) -> None:
    """Render a template with autoescaping and write report.html unless it is unchanged.

    Templates also get the name, manifest and config of the run, and `mark_change` as a filter.
    """
    environment = Environment(loader=PackageLoader("medgpt.reports"), autoescape=True)
    environment.filters["mark"] = mark_change
    environment.globals |= {"margin": EQUIVALENCE_MARGIN, "bleu_margin": BLEU_EQUIVALENCE_MARGIN}
    config = run.folder.read_text("config.toml") if run.folder.exists("config.toml") else ""
    shared = {"name": run.folder.name, "manifest": run.manifest, "config": config}
    html = environment.get_template(template).render(**shared, **values)
    if not run.folder.exists("report.html") or run.folder.read_text("report.html") != html:
        run.folder.write_text("report.html", html)


def mark_change(verdict: str) -> Markup:
    """Return the verdict on a change as HTML, with a symbol and a color for better and worse."""
    symbol = {"better": "✓ ", "worse": "✗ "}.get(verdict, "")
    return Markup('<span class="{0}">{1}{0}</span>').format(verdict, symbol)


def plot_curve(metrics: Metrics, unit: str, lines: dict[str, str]) -> str:
    """Plot metrics over steps as SVG; return an empty string if no metric was logged."""
    points = {
        label: downsample([(line["step"], line[name]) for line in metrics if name in line])
        for name, label in lines.items()
    }
    if not any(points.values()):
        return ""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.0), layout="constrained")
        axes = figure.subplots()
        for label, line in points.items():
            if line:
                marker = "." if len(line) <= MAX_MARKED_POINTS else ""
                axes.plot(*zip(*line, strict=True), label=label, marker=marker, linewidth=1.2)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend(frameon=False)
        return figure_to_svg(figure)


def _plot_margin_histogram(margins: dict[str, list[float]]) -> str:
    """Plot the histogram of score margins as SVG; pairs left of 0 are in the wrong order."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.0), layout="constrained")
        axes = figure.subplots()
        axes.stairs(margins["counts"], margins["edges"], fill=True)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel("score of the better answer minus that of the worse, in std")
        axes.set_ylabel("pairs")
        return figure_to_svg(figure)


def figure_to_svg(figure: Figure) -> str:
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata=dict.fromkeys(NO_METADATA))
    return svg.getvalue()[svg.getvalue().index("<svg") :]


def downsample(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """Average neighboring points so that at most MAX_POINTS remain."""
    size = -(-len(points) // MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size or 1)]
    return [(sum(s for s, _ in g) / len(g), sum(v for _, v in g) / len(g)) for g in groups]


def _key_numbers(metrics: Metrics) -> dict[str, str]:
    """Return the numbers at the top of the page."""
    validation = [line["validation/loss"] for line in metrics if "validation/loss" in line]
    speeds = sorted(line["train/tokens_per_s"] for line in metrics if "train/tokens_per_s" in line)
    train_lines = [line for line in metrics if "train/loss" in line]
    numbers: dict[str, str] = {}
    if train_lines:
        numbers["Steps"] = f"{train_lines[-1]['step']:,}"
        numbers["Training time"] = f"{metrics[-1]['time_s'] / 60:.1f} min"
        tokens = sum(line.get("train/tokens", 0) for line in train_lines)
        if speeds:  # TRL's trainers do not log it
            numbers["Tokens"] = f"{tokens:,.0f}"
            numbers["Tokens per second (median)"] = f"{speeds[len(speeds) // 2]:,.0f}"
        numbers["Last training loss"] = f"{train_lines[-1]['train/loss']:.4f}"
    if validation:
        mark = mark_change(classify_change("validation/loss", validation[-1] - validation[0]))
        values = f"{validation[0]:.4f} to {validation[-1]:.4f}"
        numbers["Validation loss, first to last"] = Markup("{} {}").format(values, mark)
        numbers["Best validation loss"] = f"{min(validation):.4f}"
    return numbers

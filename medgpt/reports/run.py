"""report.html of a run: one self-contained page with curves, counts, config and samples.

It shows numbers and what the model generated, never rows of the data.
"""

import io
from typing import Any

import matplotlib
import tomli_w
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure
from matplotlib.typing import RcKeyType

from medgpt.runs import Run
from medgpt.train.reward_eval import FINDINGS

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
MAX_POINTS = 1000  # of a line; more are averaged in groups
MARKED_POINTS = 40  # a line of at most so many shows each
STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "medgpt",  # the same curve is the same file
    "axes.spines.top": False,
    "axes.spines.right": False,
}

Metrics = list[dict[str, Any]]


def write_report(run: Run) -> None:
    """Write report.html from what the run directory holds."""
    metrics = run.metrics()
    samples = run.folder.read_json("samples.json") if run.folder.exists("samples.json") else []
    findings = run.folder.read_json(FINDINGS) if run.folder.exists(FINDINGS) else None
    units = {LOSS: "nats per prompt"} if findings else {}
    curves = [
        (title, curve(metrics, units.get(title, unit), lines)) for title, unit, lines in CURVES
    ]
    if findings and findings["pairs"]:
        curves.insert(0, ("Lead of the better answer, held out", _histogram(findings["leads"])))
    html = page(
        "report.html.jinja",
        name=run.folder.url.rsplit("/", 1)[-1],
        manifest=run.manifest,
        config=tomli_w.dumps(run.config),
        curves=[(title, svg) for title, svg in curves if svg],
        facts=_facts(metrics),
        samples=samples,
        findings=findings,
    )
    run.folder.write_text("report.html", html)


def page(template: str, **values: Any) -> str:
    """A template filled in, everything escaped."""
    return (
        Environment(loader=PackageLoader("medgpt.reports"), autoescape=True)
        .get_template(template)
        .render(values)
    )


def curve(metrics: Metrics, unit: str, lines: dict[str, str]) -> str:
    """An SVG of metrics over steps, empty if there are none."""
    points = {
        label: thinned([(line["step"], line[name]) for line in metrics if name in line])
        for name, label in lines.items()
    }
    if not any(points.values()):
        return ""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.0), layout="constrained")
        axes = figure.subplots()
        for label, line in points.items():
            if line:
                marker = "." if len(line) <= MARKED_POINTS else ""
                axes.plot(*zip(*line, strict=True), label=label, marker=marker, linewidth=1.2)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend(frameon=False)
        return as_svg(figure)


def _histogram(leads: dict[str, list[float]]) -> str:
    """An SVG of how far better answers' scores lead; what is left of 0 is in the wrong order."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.0), layout="constrained")
        axes = figure.subplots()
        axes.stairs(leads["counts"], leads["edges"], fill=True)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel("score of the better answer less that of the worse, in deviations")
        axes.set_ylabel("pairs")
        return as_svg(figure)


def as_svg(figure: Figure) -> str:
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata=dict.fromkeys(NO_METADATA))
    return svg.getvalue()[svg.getvalue().index("<svg") :]


def thinned(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most MAX_POINTS points, each the mean of as many neighbours."""
    size = -(-len(points) // MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size or 1)]
    return [(sum(s for s, _ in g) / len(g), sum(v for _, v in g) / len(g)) for g in groups]


def _facts(metrics: Metrics) -> dict[str, str]:
    """The numbers a reader looks for first."""
    validation = [line["validation/loss"] for line in metrics if "validation/loss" in line]
    speed = sorted(line["train/tokens_per_s"] for line in metrics if "train/tokens_per_s" in line)
    trained = [line for line in metrics if "train/loss" in line]
    facts: dict[str, str] = {}
    if trained:
        facts["Steps"] = f"{trained[-1]['step']:,}"
        facts["Training time"] = f"{metrics[-1]['time_s'] / 60:.1f} min"
        tokens = sum(line.get("train/tokens", 0) for line in trained)
        if speed:  # TRL's trainers do not tell
            facts["Tokens"] = f"{tokens:,.0f}"
            facts["Tokens per second (median)"] = f"{speed[len(speed) // 2]:,.0f}"
        facts["Last training loss"] = f"{trained[-1]['train/loss']:.4f}"
    if validation:
        facts["Validation loss, first to last"] = f"{validation[0]:.4f} to {validation[-1]:.4f}"
        facts["Best validation loss"] = f"{min(validation):.4f}"
    return facts

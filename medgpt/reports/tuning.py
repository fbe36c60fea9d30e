"""report.html of a search: its trials side by side, marks against divergence, learning curves."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import matplotlib
import tomli_w
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from medgpt.config.tune import TuneStageConfig
from medgpt.reports.run import STYLE, as_svg, page
from medgpt.runs import Run
from medgpt.tune.results import BEST, Outcome, front, outcomes, winner
from medgpt.tune.winner_check import FILE as CHECK
from medgpt.tune.winner_check import standard_error

COLOURS = matplotlib.colormaps["viridis"]
GREY = "#b8c4ce"  # of a trial without a mark
ENDS = 0.04  # space above and below an axis of values


def write_tune_report(run: Run, config: TuneStageConfig) -> None:
    """Write report.html from what the run directory holds."""
    found = outcomes(config)
    best, efficient = winner(found, config), front(found)
    rows = run.folder.read_json(CHECK) if run.folder.exists(CHECK) else []
    html = page(
        "tune.html.jinja",
        name=run.folder.url.rsplit("/", 1)[-1],
        manifest=run.manifest,
        config=tomli_w.dumps(run.config),
        settings=config.tune,
        share=config.check.share,
        keys=list(config.search),
        facts=_facts(run, found),
        best=best,
        best_toml=run.folder.read_text(BEST) if best is not None else "",
        own=config.own_values,
        trials=sorted(found, key=lambda o: -(o.last.mark if o.last else -math.inf)),
        efficient=efficient,
        check=_check(rows),
        curves=[
            ("All trials", parallel_coordinates(found, config)),
            ("Marks while training", learning_curves(found, config)),
            ("Marks and divergence", trade_off(found, efficient, config)),
        ],
    )
    run.folder.write_text("report.html", html)


def parallel_coordinates(found: Sequence[Outcome], config: TuneStageConfig) -> str:
    """An SVG: an axis for each searched key and one for the mark, a line for each trial."""
    keys = [*config.search, config.tune.mark]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.2 * len(keys), 4.2), layout="constrained")
        axes = figure.subplots()
        scales = [_Scale(config, key, found) for key in keys]
        for outcome in sorted(found, key=_mark):
            places = [scale.place(outcome) for scale in scales]
            known = [(x, y) for x, y in enumerate(places) if y is not None]
            axes.plot(*zip(*known, strict=True), color=_colour(outcome, found), linewidth=1.6)
        for x, (key, scale) in enumerate(zip(keys, scales, strict=True)):
            axes.axvline(x, color="black", linewidth=0.8)
            for y, text in scale.ticks():
                axes.text(x + 0.03, y, text, fontsize=8, va="center")
            axes.text(x, 1 + 2.5 * ENDS, key, ha="center", fontsize=9)
        axes.set_xlim(-0.1, len(keys) - 0.6)
        axes.set_ylim(-ENDS, 1 + 4 * ENDS)
        axes.axis("off")
        return as_svg(figure)


def learning_curves(found: Sequence[Outcome], config: TuneStageConfig) -> str:
    """An SVG of every trial's marks over iterations; where it ends, it was ended."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.subplots()
        for outcome in found:
            if outcome.points:
                steps = [point.iteration for point in outcome.points]
                marks = [point.mark for point in outcome.points]
                colour = _colour(outcome, found)
                axes.plot(steps, marks, marker=".", color=colour, linewidth=1.2)
                axes.annotate(outcome.record.name, (steps[-1], marks[-1]), fontsize=7)
        _label(axes, "iteration", f"the judge's {config.tune.mark}")
        return as_svg(figure)


def trade_off(
    found: Sequence[Outcome], efficient: Sequence[Outcome], config: TuneStageConfig
) -> str:
    """An SVG of the trials' last marks over their divergence, the best ones joined."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.subplots()
        for outcome in found:
            if (last := outcome.last) is not None:
                filled = outcome.record.status == "finished"
                axes.errorbar(
                    last.kl,
                    last.mark,
                    last.error,
                    fmt="o",
                    color=_colour(outcome, found),
                    fillstyle="full" if filled else "none",
                )
                axes.annotate(f" {outcome.record.name}", (last.kl, last.mark), fontsize=7)
        line = [(o.last.kl, o.last.mark) for o in efficient if o.last is not None]
        if line:
            axes.step(*zip(*line, strict=True), where="post", color="black", linewidth=0.8)
        axes.axvline(config.tune.max_kl, color="#b3261e", linewidth=0.8, linestyle="--")
        _label(axes, "nats per answer from the reference", f"the judge's {config.tune.mark}")
        return as_svg(figure)


class _Scale:
    """Where the values of one key lie on an axis from 0 to 1."""

    def __init__(self, config: TuneStageConfig, key: str, found: Sequence[Outcome]) -> None:
        self.key = key
        self.space = config.search.get(key)
        values = [value for outcome in found if (value := self._value(outcome)) is not None]
        self.listed: list[Any] = []
        if self.space is not None and self.space.values is not None:
            self.listed = list(dict.fromkeys([*self.space.values, *values]))
            return
        ends = [*values, *(self.space.bounds or () if self.space is not None else ())]
        self.low, self.high = (min(ends), max(ends)) if ends else (0.0, 1.0)
        self.is_log = self.space is not None and self.space.loguniform is not None

    def place(self, outcome: Outcome) -> float | None:
        value = self._value(outcome)
        return None if value is None else self._height(value)

    def ticks(self) -> list[tuple[float, str]]:
        if self.listed:
            return [(self._height(value), str(value)) for value in self.listed]
        return [(self._height(value), f"{value:.3g}") for value in (self.low, self.high)]

    def _value(self, outcome: Outcome) -> Any:
        if self.space is None:
            return outcome.last and outcome.last.mark
        return outcome.record.params[self.key]

    def _height(self, value: Any) -> float:
        if self.listed:
            return (self.listed.index(value) + 0.5) / len(self.listed)
        if self.low == self.high:
            return 0.5
        if self.is_log and self.low > 0:
            span = math.log(self.high) - math.log(self.low)
            return (math.log(value) - math.log(self.low)) / span
        return (value - self.low) / (self.high - self.low)


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)


def _mark(outcome: Outcome) -> float:
    return outcome.last.mark if outcome.last is not None else -math.inf


def _colour(outcome: Outcome, found: Sequence[Outcome]) -> str:
    """The better the lighter."""
    if outcome.last is None:
        return GREY
    marks = sorted({other.last.mark for other in found if other.last is not None})
    return to_hex(COLOURS(marks.index(outcome.last.mark) / max(1, len(marks) - 1)))


def _facts(run: Run, found: Sequence[Outcome]) -> dict[str, str]:
    """The numbers a reader looks for first."""
    counts: dict[str, int] = {}
    for outcome in found:
        counts[outcome.record.status] = counts.get(outcome.record.status, 0) + 1
    facts = {status.capitalize(): str(count) for status, count in counts.items()}
    facts["Training time, all trials"] = f"{sum(o.time_s for o in found) / 60:.1f} min"
    iterations = sum(o.points[-1].iteration for o in found if o.points)
    facts["Iterations, all trials"] = f"{iterations:,}"
    if shared := run.manifest.get("shared_pools"):
        facts["Calls to shared pools, in batches"] = f"{shared['calls']:,} in {shared['batches']:,}"
    return facts


def _check(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each policy, over its seeds."""
    found = []
    for who in dict.fromkeys(row["policy"] for row in rows):
        mine = [row for row in rows if row["policy"] == who]
        marks, kls = [row["mark"] for row in mine], [row["kl"] for row in mine]
        found.append(
            {
                "policy": who,
                "marks": marks,
                "mean": fmean(marks),
                "error": standard_error(marks),
                "kl": None if None in kls else fmean(kls),
            }
        )
    return found

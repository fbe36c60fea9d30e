"""report.html of a search: trials side by side, metric against KL, learning curves."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from medgpt.config.tune import TuneStageConfig
from medgpt.reports.run import STYLE, figure_to_svg, write_page
from medgpt.reports.scores import classify_change
from medgpt.runs import Run
from medgpt.tune.results import BEST_CONFIG_FILE, TrialResult, load_results, pareto_front, winner
from medgpt.tune.winner_check import BASE, standard_error
from medgpt.tune.winner_check import CHECK_FILE as CHECK

COLORMAP = matplotlib.colormaps["viridis"]
GREY = "#b8c4ce"  # a trial without a metric
AXIS_PADDING = 0.04  # margin above and below an axis


def write_tune_report(run: Run, config: TuneStageConfig) -> None:
    """Write report.html from the files of the run directory."""
    results = load_results(config)
    best, pareto_trials = winner(results, config), pareto_front(results)
    rows = run.folder.read_json(CHECK) if run.folder.exists(CHECK) else []
    write_page(
        run,
        "tune.html.jinja",
        settings=config.tune,
        share=config.check.share,
        keys=list(config.search),
        key_numbers=_key_numbers(run, results),
        best=best,
        best_toml=run.folder.read_text(BEST_CONFIG_FILE) if best is not None else "",
        base_values=config.base_values,
        trials=sorted(results, key=_last_metric, reverse=True),
        verdicts={trial.record.name: _change_in_training(trial, config) for trial in results},
        pareto_trials=pareto_trials,
        check_rows=_check_rows(rows, f"judge/{config.tune.metric}"),
        curves=[
            ("All trials", plot_parallel_coordinates(results, config)),
            ("Metric during training", plot_learning_curves(results, config)),
            ("Metric against KL", plot_metric_against_kl(results, pareto_trials, config)),
        ],
    )


def plot_parallel_coordinates(results: Sequence[TrialResult], config: TuneStageConfig) -> str:
    """Plot an axis for each searched key and one for the metric, and a line for each trial."""
    keys = [*config.search, config.tune.metric]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.2 * len(keys), 4.2), layout="constrained")
        axes = figure.subplots()
        scales = [_ParallelAxis(config, key, results) for key in keys]
        for trial in sorted(results, key=_last_metric):
            places = [scale.position(trial) for scale in scales]
            known = [(x, y) for x, y in enumerate(places) if y is not None]
            axes.plot(*zip(*known, strict=True), color=_trial_color(trial, results), linewidth=1.6)
        for x, (key, scale) in enumerate(zip(keys, scales, strict=True)):
            axes.axvline(x, color="black", linewidth=0.8)
            for y, text in scale.ticks():
                axes.text(x + 0.03, y, text, fontsize=8, va="center")
            axes.text(x, 1 + 2.5 * AXIS_PADDING, key, ha="center", fontsize=9)
        axes.set_xlim(-0.1, len(keys) - 0.6)
        axes.set_ylim(-AXIS_PADDING, 1 + 4 * AXIS_PADDING)
        axes.axis("off")
        return figure_to_svg(figure)


def plot_learning_curves(results: Sequence[TrialResult], config: TuneStageConfig) -> str:
    """Plot the metric of every trial over iterations, up to where the trial ended."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.subplots()
        for trial in results:
            if trial.judge_results:
                steps = [point.iteration for point in trial.judge_results]
                metrics = [point.metric for point in trial.judge_results]
                color = _trial_color(trial, results)
                axes.plot(steps, metrics, marker=".", color=color, linewidth=1.2)
                axes.annotate(trial.record.name, (steps[-1], metrics[-1]), fontsize=7)
        _label_axes(axes, "iteration", f"the judge's {config.tune.metric}")
        return figure_to_svg(figure)


def plot_metric_against_kl(
    results: Sequence[TrialResult], pareto_trials: Sequence[TrialResult], config: TuneStageConfig
) -> str:
    """Plot the last metric of the trials over their KL, with the Pareto front as a line."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.subplots()
        for trial in results:
            if (last := trial.last_result) is not None:
                filled = trial.record.status == "finished"
                axes.errorbar(
                    last.kl,
                    last.metric,
                    last.metric_se,
                    fmt="o",
                    color=_trial_color(trial, results),
                    fillstyle="full" if filled else "none",
                )
                axes.annotate(f" {trial.record.name}", (last.kl, last.metric), fontsize=7)
        last_results = [trial.last_result for trial in pareto_trials]
        line = [(last.kl, last.metric) for last in last_results if last is not None]
        if line:
            axes.step(*zip(*line, strict=True), where="post", color="black", linewidth=0.8)
        axes.axvline(config.tune.max_kl, color="#b3261e", linewidth=0.8, linestyle="--")
        _label_axes(axes, "KL from the reference, nats", f"the judge's {config.tune.metric}")
        return figure_to_svg(figure)


class _ParallelAxis:
    """Maps the values of one key to positions on an axis from 0 to 1."""

    def __init__(self, config: TuneStageConfig, key: str, results: Sequence[TrialResult]) -> None:
        self.key = key
        self.space = config.search.get(key)
        values = [value for trial in results if (value := self._value(trial)) is not None]
        self.listed_values: list[Any] = []
        if self.space is not None and self.space.values is not None:
            self.listed_values = list(dict.fromkeys([*self.space.values, *values]))
            return
        endpoints = [*values, *(self.space.bounds or () if self.space is not None else ())]
        self.low, self.high = (min(endpoints), max(endpoints)) if endpoints else (0.0, 1.0)
        self.is_log = self.space is not None and self.space.loguniform is not None

    def position(self, trial: TrialResult) -> float | None:
        value = self._value(trial)
        return None if value is None else self._height(value)

    def ticks(self) -> list[tuple[float, str]]:
        if self.listed_values:
            return [(self._height(value), str(value)) for value in self.listed_values]
        return [(self._height(value), f"{value:.3g}") for value in (self.low, self.high)]

    def _value(self, trial: TrialResult) -> Any:
        if self.space is None:
            return trial.last_result and trial.last_result.metric
        return trial.record.params[self.key]

    def _height(self, value: Any) -> float:
        if self.listed_values:
            return (self.listed_values.index(value) + 0.5) / len(self.listed_values)
        if self.low == self.high:
            return 0.5
        if self.is_log and self.low > 0:
            span = math.log(self.high) - math.log(self.low)
            return (math.log(value) - math.log(self.low)) / span
        return (value - self.low) / (self.high - self.low)


def _label_axes(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)


def _change_in_training(trial: TrialResult, config: TuneStageConfig) -> str:
    """Return whether the metric is better or worse after training than before it."""
    if len(trial.judge_results) < 2:
        return ""
    first, last = trial.judge_results[0], trial.judge_results[-1]
    noise = 2 * math.hypot(first.metric_se, last.metric_se)
    return classify_change(f"judge/{config.tune.metric}", last.metric - first.metric, noise)


def _last_metric(trial: TrialResult) -> float:
    return trial.last_result.metric if trial.last_result is not None else -math.inf


def _trial_color(trial: TrialResult, results: Sequence[TrialResult]) -> str:
    """Return the color of a trial: the higher its metric, the lighter."""
    if trial.last_result is None:
        return GREY
    metrics = sorted({other.last_result.metric for other in results if other.last_result})
    return to_hex(COLORMAP(metrics.index(trial.last_result.metric) / max(1, len(metrics) - 1)))


def _key_numbers(run: Run, results: Sequence[TrialResult]) -> dict[str, str]:
    """Return the numbers at the top of the page."""
    counts: dict[str, int] = {}
    for trial in results:
        counts[trial.record.status] = counts.get(trial.record.status, 0) + 1
    numbers = {status.capitalize(): str(count) for status, count in counts.items()}
    numbers["Training time, all trials"] = f"{sum(o.time_s for o in results) / 60:.1f} min"
    iterations = sum(o.judge_results[-1].iteration for o in results if o.judge_results)
    numbers["Iterations, all trials"] = f"{iterations:,}"
    if shared := run.manifest.get("shared_pools"):
        numbers["Calls to shared pools, in batches"] = (
            f"{shared['calls']:,} in {shared['batches']:,}"
        )
    return numbers


def _check_rows(rows: Sequence[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Return a row for each policy with the results of its seeds."""
    policy_rows = []
    for policy in dict.fromkeys(row["policy"] for row in rows):
        seed_rows = [row for row in rows if row["policy"] == policy]
        metrics, kls = [row["mark"] for row in seed_rows], [row["kl"] for row in seed_rows]
        policy_rows.append(
            {
                "policy": policy,
                "metrics": metrics,
                "mean": fmean(metrics),
                "error": standard_error(metrics),
                "kl": None if None in kls else fmean(kls),
                "verdict": "",
            }
        )
    if base := next((row for row in policy_rows if row["policy"] == BASE), None):
        for row in policy_rows:
            noise = 2 * math.hypot(row["error"], base["error"])
            row["verdict"] = classify_change(metric, row["mean"] - base["mean"], noise)
    return policy_rows

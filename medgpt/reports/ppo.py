"""report.html of a PPO run: scores before and after, curves, time by phase, rollouts."""

import math
from statistics import fmean
from typing import Any

from medgpt.reports.run import Metrics, plot_curve, write_page
from medgpt.reports.scores import EQUIVALENCE_MARGIN, LOWER_IS_BETTER, classify_change
from medgpt.runs import Run

ROLLOUT_SAMPLES = "rollouts.json"
"""File with sampled rollouts: a list of {"iteration", "prompt", "answer", "total",
"components": {name: number}}, none from a sensitive source."""
WINDOW_ITERATIONS = 5  # iterations that are averaged for "before" and "after"
CURVES = (  # title, unit, metric -> label
    (
        "Score",
        "reward of an answer, before KL",
        {"ppo/score_mean": "score", "rewards/total": "total"},
    ),
    ("KL from the reference", "nats per answer", {"actor/kl_ref": "KL"}),
    ("Answers", "tokens", {"rollout/response_tokens": "length"}),
    ("Answers that ended with EOS", "share", {"rollout/eos_rate": "finished"}),
    ("Entropy", "nats per token", {"actor/entropy": "entropy"}),
    ("Policy", "share, nats", {"actor/clip_frac": "clipped", "actor/approx_kl": "step KL"}),
    ("PPO-ptx", "nats per token", {"actor/ptx_loss": "loss"}),
    ("Critic", "explained variance", {"critic/explained_variance": "critic"}),
    ("Speed", "samples per second", {"ppo/samples_per_s": "all workers"}),
)
COMPARED_METRICS = {  # metric -> label
    "ppo/score_mean": "score in training",
    "judge/score": "held-out reward model",
    "judge/checks": "held-out checks",
    "judge/key_points": "key points stated",
    "judge/triage_under": "red flags missed",
    "judge/triage_over": "sent to emergency without need",
    "rewards/capped": "answers that violate a rule",
    "rollout/response_tokens": "tokens of an answer",
    "actor/kl_ref": "nats from the reference",
}
REWARDS_PREFIX = "rewards/"
# shown in this order, then all others
PHASE_ORDER = ("generate", "score", "update", "sync", "prompts", "wait")


def write_ppo_report(run: Run) -> None:
    """Write report.html from the files of the run directory."""
    metrics = run.metrics()
    samples = run.folder.read_json(ROLLOUT_SAMPLES) if run.folder.exists(ROLLOUT_SAMPLES) else []
    components = _component_names(metrics)
    component_labels = {f"{REWARDS_PREFIX}{name}": name for name in components}
    violation_labels = {f"{REWARDS_PREFIX}{name}_violations": name for name in components}
    curve_specs = [
        *CURVES[:1],
        ("Reward components", "mean, before weights", component_labels),
        ("Rule violations", "share of the answers", violation_labels),
        ("Judge", "held-out questions", {"judge/checks": "checks", "judge/score": "reward model"}),
        *CURVES[1:],
    ]
    curves = [(title, plot_curve(metrics, unit, lines)) for title, unit, lines in curve_specs]
    write_page(
        run,
        "ppo.html.jinja",
        key_numbers=_key_numbers(metrics),
        compared=_before_and_after(metrics),
        phase_times=_phase_times(metrics),
        curves=[(title, svg) for title, svg in curves if svg],
        samples=_group_by_prompt(samples),
    )


def _component_names(metrics: Metrics) -> list[str]:
    """Return the names of the reward components in the order in which they were logged."""
    reward_keys = [key for line in metrics for key in line if key.startswith(REWARDS_PREFIX)]
    names = [key.removeprefix(REWARDS_PREFIX) for key in reward_keys if key.endswith("_masked")]
    return list(dict.fromkeys(name.removesuffix("_masked") for name in names))


def _before_and_after(metrics: Metrics) -> list[dict[str, Any]]:
    """Return the first and last values of each metric, averaged if every iteration logs it."""
    rows = []
    for name, label in COMPARED_METRICS.items():
        values = [line[name] for line in metrics if name in line]
        if len(values) < 2:
            continue
        window = 1 if name.startswith("judge/") else min(WINDOW_ITERATIONS, len(values) // 2)
        before, after = fmean(values[:window]), fmean(values[-window:])
        errors = [line[f"{name}_se"] for line in metrics if f"{name}_se" in line]
        noise = 2 * math.hypot(errors[0], errors[-1]) if errors else EQUIVALENCE_MARGIN
        row = {"label": label, "before": before, "after": after}
        row["errors"] = (errors[0], errors[-1]) if errors else None
        row["lower_is_better"] = name in LOWER_IS_BETTER
        row["verdict"] = classify_change(name, after - before, noise)
        rows.append(row)
    return rows


def _phase_times(metrics: Metrics) -> list[dict[str, Any]]:
    """Return the mean seconds of each phase and its share of an iteration."""
    lines = [line for line in metrics if "time/iteration_s" in line]
    if not lines:
        return []
    iteration_s = fmean(line["time/iteration_s"] for line in lines)
    keys = [k for line in lines for k in line if k.startswith("time/") and k.endswith("_s")]
    names = [key.removeprefix("time/").removesuffix("_s") for key in dict.fromkeys(keys)]
    names = [name for name in names if name != "iteration"]
    ordered = [p for p in PHASE_ORDER if p in names] + [n for n in names if n not in PHASE_ORDER]
    return [
        {"name": name, "seconds": seconds, "share": seconds / iteration_s}
        for name in ordered
        for seconds in [fmean(line.get(f"time/{name}_s", 0.0) for line in lines)]
    ]


def _key_numbers(metrics: Metrics) -> dict[str, str]:
    """Return the numbers at the top of the page."""
    iterations = [line for line in metrics if "ppo/score_mean" in line]
    if not iterations:
        return {}
    last = iterations[-1]
    numbers = {"Iterations": f"{last['step']:,}", "Time": f"{last['time_s'] / 60:.1f} min"}
    speeds = sorted(line["ppo/samples_per_s"] for line in iterations if "ppo/samples_per_s" in line)
    if speeds:
        numbers["Samples per second (median)"] = f"{speeds[len(speeds) // 2]:,.2f}"
    skipped = sum(line.get("ppo/skipped_steps", 0) for line in iterations)
    numbers["Skipped steps"] = f"{skipped:,.0f}"
    masked_shares = [line["rewards/masked"] for line in iterations if "rewards/masked" in line]
    if masked_shares:
        numbers["Samples without reward"] = f"{fmean(masked_shares):.2%}"
    return numbers


def _group_by_prompt(samples: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Group the samples by prompt, the earliest first."""
    answers_by_prompt: dict[str, list[dict[str, Any]]] = {}
    for sample in sorted(samples, key=lambda sample: sample["iteration"]):
        answers_by_prompt.setdefault(sample["prompt"], []).append(sample)
    return list(answers_by_prompt.items())

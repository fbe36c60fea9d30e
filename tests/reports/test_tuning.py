import re

import pytest

from medgpt.reports.tuning import write_tune_report
from medgpt.runs import Run
from medgpt.tune.results import load_results, trials_url, winner, write_best
from medgpt.tune.trial_records import StateCopy, TrialRecord, TrialRecords
from tests.reports.test_run import RESOURCE
from tests.tune.cases import search_config
from tests.tune.test_results import PARAMS, write_trials

CHECK = [
    {"policy": who, "seed": seed, "mark": mark + seed / 100, "mark_se": 0.1, "kl": 2.0}
    for who, mark in (("base", 0.3), ("winner", 0.6))
    for seed in (1, 2, 3)
]
TRIALS = {
    "001": ("finished", [(0, 0.1, 0.0), (2, 0.3, 1.0), (4, 0.5, 2.0)]),
    "002": ("stopped", [(0, 0.1, 0.0), (2, 0.2, 1.5)]),
    "003": ("finished", [(0, 0.1, 0.0), (2, 0.2, 1.0), (4, 0.9, 30.0)]),
    "004": ("diverged", []),
}


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tune")
    config = search_config(folder, folder, "search.ppo.epochs={choice=[1,2]}")
    run = Run.open("tune", config, run_dir=config.run.dir, allow_changes=False)
    write_trials(config, TRIALS)
    records = TrialRecords(trials_url(config))
    for record in records.all():
        records.write(
            TrialRecord(record.name, PARAMS | record.params | {"ppo.epochs": 2}, record.status)
        )
    copied = (StateCopy("003", 2, PARAMS),)
    records.write(TrialRecord("004", PARAMS | {"ppo.epochs": 1}, "diverged", "<b>nats</b>", copied))
    run.folder.write_json("check.json", CHECK)
    run.update_manifest(shared_pools={"calls": 1200, "batches": 700})
    best = winner(load_results(config), config)
    assert best is not None
    write_best(run, best, config)
    write_tune_report(run, config)
    return run.folder.read_text("report.html")


def text(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def row_text(html: str, first: str) -> str:
    rows = re.findall(r"<tr>.*?</tr>", html, re.DOTALL)
    return next(row_text_ for r in rows if (row_text_ := text(r).strip()).startswith(first))


def test_the_winner_is_shown_beside_the_base_values(report):
    assert "Trial 001: checks 0.500 ± 0.050 , 2.00 nats" in text(report)
    assert row_text(report, "ppo.kl_coef") == "ppo.kl_coef 0.1 0.05"
    assert "best.toml" in report


def test_the_check_has_every_seed_and_their_mean(report):
    assert row_text(report, "base 0.320 ± 0.006") == "base 0.320 ± 0.006 0.310 · 0.320 · 0.330 2.00"
    assert row_text(report, "winner 0.620")


def test_trials_are_sorted_by_metric_and_show_their_status(report):
    table = report.split("<h2>Trials</h2>")[1].split("</table>")[0]
    assert re.findall(r"<tr><td>(\d+)", table) == ["003", "001", "002", "004"]
    assert re.findall(r"<td>(\d+) <span class=\"hit\"", table) == ["003", "001", "002"]
    assert "&lt;b&gt;nats&lt;/b&gt;" in table
    assert "copied 003 at 2" in table
    assert 'miss" data-label="KL">30.00' in table


def test_every_key_has_an_axis_and_every_judged_trial_a_line(report):
    figures = dict(
        re.findall(r"<figure><figcaption>(.*?)</figcaption>(.*?)</figure>", report, re.DOTALL)
    )
    for key in ("ppo.kl_coef", "optimizer.learning_rate", "ppo.epochs", "checks"):
        assert f">{key}<" in figures["All trials"]
    for name in ("001", "002", "003"):
        assert f">{name}<" in figures["Metric during training"]
        assert (
            f"> {name}<" in figures["Metric against KL"]
            or f">{name}<" in figures["Metric against KL"]
        )


def test_the_report_loads_no_external_resource(report):
    assert not RESOURCE.search(report)


def test_a_search_without_winner_has_a_report(tmp_path):
    config = search_config(tmp_path, tmp_path)
    run = Run.open("tune", config, run_dir=config.run.dir, allow_changes=False)
    write_trials(config, {"001": ("refused", [])})
    write_tune_report(run, config)
    assert "No winner" in run.folder.read_text("report.html")

"""The quickstart's gates separate a model that learned the corpus from models that did not."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medgpt.config.evaluation import EvalConfig
from medgpt.config.gates import parse_gate
from medgpt.config.loading import load
from medgpt.config.stages import CorpusConfig, PipelineConfig, RunConfig
from medgpt.eval.gates import GateResult, check_gates
from medgpt.eval.preparation import build_tasks
from medgpt.eval.requests import Generate, GenerateResponse, dummy_response
from medgpt.eval.summary import summarize_task
from medgpt.eval.task import Task
from medgpt.medical.key_points import KeyPointQuestion, read_key_point_questions
from medgpt.sample_corpus.generator import CorpusGenerator
from medgpt.stages.corpus import run_corpus
from medgpt.stages.evaluate import run_eval

ROOT = Path(__file__).parent.parent.parent
DEBUG = ROOT / "configs" / "debug"
FACTS = ("statements", "questions", "headache")  # tasks that need facts of the corpus
AMBULANCE = "这是急症,请立即拨打120。"


def quickstart_gates(*stages: str) -> list[str]:
    gates = load(PipelineConfig, DEBUG / "quickstart.toml").gates
    return [gate for stage in stages for gate in gates[stage]]


def is_about_facts(gate: str) -> bool:
    """Whether a model must know facts to pass the gate."""
    parsed = parse_gate(gate)
    return parsed.task in FACTS and parsed.sign in (">=", "==")


FACT_GATES = list(
    filter(is_about_facts, quickstart_gates("after-pretrain", "after-sft", "after-ppo"))
)


def quickstart_eval_config(folder: Path, *overrides: str) -> EvalConfig:
    """Return the quickstart's config, on a sample corpus in `folder`."""
    data = folder / "corpus" / "data"
    if not data.exists():
        run_corpus(CorpusConfig(run=RunConfig(dir=str(folder / "corpus"))))
    shared = load(PipelineConfig, DEBUG / "quickstart.toml").overrides["eval"]
    paths = [text.replace("{dir}", str(folder)) for text in shared]
    return load(EvalConfig, DEBUG / "eval.toml", [f"run.dir={folder}/run", *paths, *overrides])


# ---- models that answer by a rule ----

Answer = Callable[[KeyPointQuestion], str]


def knows_corpus(corpus: CorpusGenerator) -> Answer:
    """Return answers of a model that knows the whole corpus by heart."""
    by_id = {condition.id: condition for condition in corpus.conditions}
    complaint = list(corpus.complaint_replies())[-1][2]

    def answer(question: KeyPointQuestion) -> str:
        if question.kind.startswith("rlhf"):
            return complaint
        if question.topic not in by_id:  # left out
            return "抱歉,我不知道。"
        fields = {held.prompt: held.field for held in corpus.held_out.prompts}
        return corpus.wording.answer(by_id[question.topic], fields[question.prompt])

    return answer


def results_of(folder: Path, answer: Answer, triage: str = "") -> dict[str, Any]:
    """Return results.json of the quickstart's evaluation for a model that answers by a rule."""
    config = quickstart_eval_config(folder)
    questions = {q.id: q for q in read_key_point_questions(config.key_points[0].path, ())}

    def respond(task: Task, request: Any) -> Any:
        if not isinstance(request, Generate) or task.kind == "safety":
            return dummy_response(request)
        question = questions.get(request.id.removesuffix("-samples"))
        text = triage if question is None else answer(question)
        return GenerateResponse(request.id, [text] * request.samples, [True] * request.samples)

    summaries = {}
    for task in build_tasks(config):
        responses = {request.id: respond(task, request) for request in task.requests()}
        summaries[task.name] = summarize_task(task, task.grade(responses), 0)
    return {"tasks": summaries}


def passed_gates(gates: list[str], scores: dict[str, Any]) -> dict[str, bool]:
    """Return the outcome of each gate; the parent is a model with all scores 0."""
    zero_results = {
        "tasks": {name: _with_zero_metrics(task) for name, task in scores["tasks"].items()}
    }
    gate_results: list[GateResult] = check_gates(gates, scores, zero_results)
    return {item.gate: item.passed for item in gate_results}


def _with_zero_metrics(task: dict[str, Any]) -> dict[str, Any]:
    return task | {"metrics": {name: s | {"value": 0.0} for name, s in task["metrics"].items()}}


def test_gates_about_facts_cover_all_three_questions_and_their_phrasings():
    names = {".".join(parse_gate(gate).name) for gate in FACT_GATES}
    for question in ("statements.diabetes", "questions.coronary_atherosclerosis", "headache.rlhf"):
        assert {f"{question}.greedy_passed", f"{question}.sampled_passed"} <= names
    assert {"questions.phrasing.greedy_passed", "headache.greedy_passed"} <= names
    config = load(EvalConfig, DEBUG / "eval.toml")
    assert [task.samples for task in config.key_points] == [5, 5, 5]


def test_a_model_that_learned_the_corpus_passes_every_gate_about_facts(tmp_path: Path):
    assert set(
        passed_gates(FACT_GATES, results_of(tmp_path, knows_corpus(CorpusGenerator()))).values()
    ) == {True}


def test_a_model_that_learned_swapped_facts_fails_every_gate_about_facts(tmp_path: Path):
    swapped = results_of(tmp_path, knows_corpus(CorpusGenerator(swap_facts=True)))
    assert set(passed_gates(FACT_GATES, swapped).values()) == {False}


def test_a_model_that_knows_facts_left_out_of_the_corpus_fails(tmp_path: Path):
    def leaked(question: KeyPointQuestion) -> str:
        return "、".join(wordings[0] for wordings in question.key_points)

    assert passed_gates(["questions.left_out <= 0"], results_of(tmp_path, leaked)) == {
        "questions.left_out <= 0": False
    }


@pytest.mark.parametrize("stage", ["after-sft", "after-ppo"])
def test_a_model_that_knows_the_facts_but_always_calls_an_ambulance_fails(
    tmp_path: Path, stage: str
):
    gates = [gate for gate in quickstart_gates(stage) if gate.startswith("triage.over")]
    assert gates
    scores = results_of(tmp_path, knows_corpus(CorpusGenerator()), triage=AMBULANCE)
    assert set(passed_gates(gates, scores).values()) == {False}


@pytest.mark.ray
def test_an_untrained_model_fails_every_gate_about_facts(
    ray_session: None, base: Path, tmp_path: Path
):
    short = [
        f"key_points.{i}.{key}" for i in range(3) for key in ("samples=1", "max_new_tokens=24")
    ]
    few = ["mcq=[]", "nll=[]", "triage=[]", "safety=[]", "cluster.num_workers=1"]
    overrides = [f"model.name={base}", "model.untrained=true", *short, *few]
    run = run_eval(quickstart_eval_config(tmp_path, *overrides))
    scores = run.folder.read_json("results.json")
    assert sum(scores["tasks"][name]["n"] for name in FACTS) == 60
    assert set(passed_gates(FACT_GATES, scores).values()) == {False}


# ---- models that are trained ----


def run_quickstart(folder: Path, *overrides: str) -> tuple[int, str]:
    """Run the quickstart and return its exit status and stderr."""
    path = DEBUG / "quickstart.toml"
    command = [sys.executable, "-m", "medgpt", "pipeline", str(path), f"run.dir={folder}"]
    process = subprocess.run([*command, *overrides], cwd=ROOT, capture_output=True, text=True)
    assert (folder / "report.html").exists(), process.stderr[-2000:]
    return process.returncode, process.stderr


def read_results(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder / stage / "results.json").read_text("utf-8"))


def read_gate_results(folder: Path, stage: str) -> dict[str, bool]:
    gate_results = json.loads((folder / stage / "gates.json").read_text("utf-8"))
    for item in gate_results:
        print(f"{stage}: {item['gate']}: {item['value']:.4f} {'passed' if item['passed'] else ''}")
    return {item["gate"]: item["passed"] for item in gate_results}


@pytest.mark.slow
@pytest.mark.ray
def test_the_quickstart_passes_its_gates_and_the_untrained_model_fails_those_about_facts(
    tmp_path: Path,
):
    folder = tmp_path / "run"
    status, errors = run_quickstart(folder)
    assert (status, errors) == (0, "")
    for stage in ("after-pretrain", "after-sft", "reward", "after-ppo"):
        assert set(read_gate_results(folder, stage).values()) == {True}
    untrained = passed_gates(FACT_GATES, read_results(folder, "base"))
    print("untrained:", untrained)
    assert set(untrained.values()) == {False}


@pytest.mark.slow
@pytest.mark.ray
def test_a_model_trained_on_swapped_facts_fails_each_gate_about_facts_after_every_stage(
    tmp_path: Path,
):
    folder = tmp_path / "run"
    overrides = load(PipelineConfig, DEBUG / "quickstart.toml").stages[0].overrides
    swapped = json.dumps([*overrides, "swap_facts=true"])
    status, errors = run_quickstart(folder, f"stages.0.overrides={swapped}")
    assert status != 0
    assert "gates: statements.diabetes.greedy_passed == pass: 0.0000" in errors
    assert not (folder / "sft").exists()
    found = read_gate_results(folder, "after-pretrain")
    assert not any(found[gate] for gate in filter(is_about_facts, found))

    # without the gates after pretraining, those after fine-tuning stop it
    status, _ = run_quickstart(folder, f"stages.0.overrides={swapped}", "gates.after-pretrain=[]")
    assert status != 0
    found = read_gate_results(folder, "after-sft")
    about_facts = list(filter(is_about_facts, found))
    assert len(about_facts) == 3
    assert not any(found[gate] for gate in about_facts)
    assert not (folder / "reward").exists()

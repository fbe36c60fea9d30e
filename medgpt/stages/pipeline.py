"""`medgpt pipeline`: run several stages in order, in one process and on one Ray."""

from collections.abc import Sequence
from dataclasses import asdict

from medgpt.config.dpo import DPOConfig
from medgpt.config.evaluation import EvalConfig
from medgpt.config.ppo import PPOStageConfig
from medgpt.config.reward_model import RewardModelConfig
from medgpt.config.stages import CorpusConfig, PipelineConfig, PretrainConfig, SFTConfig
from medgpt.eval.gates import GateFailure, GateResult, check_gates, require_passed
from medgpt.eval.results import GATES, RESULTS, read_items, reward_results
from medgpt.metrics import ConsoleReporter
from medgpt.reports.pipeline import write_pipeline_report
from medgpt.runs import Run
from medgpt.stages.corpus import run_corpus
from medgpt.stages.dpo import run_dpo
from medgpt.stages.evaluate import run_eval
from medgpt.stages.pipeline_stages import LoadedStage, PipelineStageConfig, load_stages
from medgpt.stages.ppo import run_ppo
from medgpt.stages.train import run_pretrain, run_reward, run_sft

SHOWN_QUESTION_KINDS = (
    "pretrain",
    "sft",
    "rlhf",
)  # kinds of key-point questions that are printed


def run_pipeline(config: PipelineConfig) -> Run:
    """Run all unfinished stages and write the report.

    Raises:
        ConfigError: the config of a stage is invalid.
        GateFailure: a gate failed; later stages were not run.
    """
    stages = load_stages(config)
    pipeline = Run.open(
        "pipeline", config, run_dir=config.run.dir, allow_changes=config.run.allow_changes
    )
    try:
        for stage in stages:
            _run_stage(stage.config)
            if stage.gates:
                require_passed(_check_reward_gates(stage))
    except GateFailure as failure:
        write_pipeline_report(pipeline, {stage.name: stage.run for stage in stages})
        raise GateFailure(f"{failure}; report in {pipeline.folder.url}/report.html") from None
    write_pipeline_report(pipeline, {stage.name: stage.run for stage in stages})
    if not pipeline.finished:
        urls = {stage.name: stage.run.folder.url for stage in stages}
        pipeline.update_manifest(finished=True, runs=urls)
    _print_answers(pipeline, [stage.run for stage in stages if stage.kind == "eval"])
    return pipeline


def _check_reward_gates(stage: LoadedStage) -> list[GateResult]:
    """Check the gates of a reward stage, write gates.json and return the results."""
    gate_results = check_gates(stage.gates, reward_results(stage.run), None)
    stage.run.folder.write_json(GATES, [asdict(item) for item in gate_results])
    for item in gate_results:
        print(f"{stage.name}: gate {'passed' if item.passed else 'FAILED'}: {item}")
    return gate_results


def _run_stage(config: PipelineStageConfig) -> None:
    match config:
        case CorpusConfig():
            run_corpus(config)
        case PretrainConfig():
            run_pretrain(config)
        case SFTConfig():
            run_sft(config)
        case RewardModelConfig():
            run_reward(config)
        case DPOConfig():
            run_dpo(config)
        case PPOStageConfig():
            run_ppo(config)
        case EvalConfig():
            run_eval(config)


def _print_answers(pipeline: Run, evaluations: Sequence[Run]) -> None:
    """Print the answers to the questions of each stage and the URL of the report."""
    reporter = ConsoleReporter("pipeline")
    for run in evaluations:
        for name, task in run.folder.read_json(RESULTS)["tasks"].items():
            if task["kind"] == "key_points":
                for item in read_items(run, name):
                    if item.slices["kind"] in SHOWN_QUESTION_KINDS and item.shown:
                        reporter.say(f"{item.shown['question']}\n    {item.shown['answer']}")
    reporter.say(f"report in {pipeline.folder.url}/report.html")
    reporter.close()

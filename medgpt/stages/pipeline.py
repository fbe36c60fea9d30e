"""`medgpt pipeline`: run several stages in order, in one process and on one Ray."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from medgpt.config.stages import PipelineConfig
from medgpt.eval.gates import GateFailure, GateResult, check_gates, require_passed
from medgpt.eval.results import GATES, reward_results
from medgpt.reports.pipeline import write_pipeline_report
from medgpt.runs import Run
from medgpt.stages.corpus import run_corpus
from medgpt.stages.dpo import run_dpo
from medgpt.stages.evaluate import run_eval
from medgpt.stages.opening import open_run
from medgpt.stages.pipeline_stages import LoadedStage, load_stages
from medgpt.stages.pipeline_summary import print_summary
from medgpt.stages.ppo import run_ppo
from medgpt.stages.train import run_pretrain, run_reward, run_sft

RUNNERS: dict[str, Callable[[Any], Run]] = {
    "corpus": run_corpus,
    "pretrain": run_pretrain,
    "sft": run_sft,
    "reward": run_reward,
    "dpo": run_dpo,
    "ppo": run_ppo,
    "eval": run_eval,
}


def run_pipeline(config: PipelineConfig) -> Run:
    """Run all unfinished stages and write the report; stop with GateFailure at a failed gate."""
    stages = load_stages(config)
    pipeline = open_run("pipeline", config)
    runs = {stage.name: stage.run for stage in stages}
    try:
        for stage in stages:
            RUNNERS[stage.kind](stage.config)
            if stage.gates:
                require_passed(_check_reward_gates(stage))
    except GateFailure as failure:
        write_pipeline_report(pipeline, runs)
        raise GateFailure(f"{failure}; report in {pipeline.folder.url}/report.html") from None
    write_pipeline_report(pipeline, runs)
    if not pipeline.finished:
        urls = {name: run.folder.url for name, run in runs.items()}
        pipeline.update_manifest(finished=True, runs=urls)
    print_summary(pipeline, stages)
    return pipeline


def _check_reward_gates(stage: LoadedStage) -> list[GateResult]:
    """Check the gates of a reward stage, write gates.json and return the results."""
    gate_results = check_gates(stage.gates, reward_results(stage.run), None)
    stage.run.folder.write_json(GATES, [asdict(item) for item in gate_results])
    for item in gate_results:
        print(f"{stage.name}: gate {'passed' if item.passed else 'FAILED'}: {item}")
    return gate_results

"""Scoring speed: medgpt's engine beside lm-evaluation-harness, one model, one thread each.

`python -m tests.bench.mcq` prints questions per second, the ratio and the difference in accuracy.
`letters` and `options` give the harness medgpt's prompts; `pubmedqa` is the harness's own task.
Needs the extra `bench`, in this environment or in that of `--peer-python`.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medgpt.config.evaluation import McqConfig
from medgpt.eval.requests import Loglikelihood
from medgpt.eval.tasks.mcq import McqTask
from tests.bench import common

DATA = common.DATA.parent / "mcq"
TASKS = {
    "letters": {"paths": [f"{DATA}/xmedbench_zh.jsonl"], "layout": "xmedbench"},
    "options": {
        "paths": [f"{DATA}/mmedbench_zh_rationale.jsonl"],
        "layout": "mmedbench",
        "scoring": "option",
    },
    "pubmedqa": {
        "paths": [f"{DATA}/pubmedqa_l_en.jsonl"],
        "layout": "pubmedqa",
        "scoring": "option",
    },
}
Score = dict[str, Any]


def tiny_model(folder: Path, size: common.Size) -> Path:
    """Fresh weights and a vocabulary made for the questions; made once."""
    data, base = (
        folder / "questions.jsonl",
        folder / f"mcq-{size.hidden}x{size.layers}x{size.vocab}",
    )
    if not (base / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        prompts = [request.prompt for name in TASKS for request in _requests(questions(name, 500))]
        rows = ({"messages": [{"role": "user", "content": prompt}]} for prompt in prompts)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        common.write_base(base, data, size)
    return base


def medgpt_score(model: Path, name: str, limit: int) -> Score:
    """Score in a separate process, like the peer."""
    command = [sys.executable, "-m", "tests.bench.mcq", "--score", name]
    return _json_of([*command, "--model", str(model), "--limit", str(limit)])


def score(model: Path, name: str, limit: int) -> None:
    """Print the scores that `medgpt_score` reads."""
    import time

    import torch

    from medgpt.config.evaluation import EvalPoolConfig
    from medgpt.eval.engine import EvalEngine

    torch.set_num_threads(1)
    engine = EvalEngine(str(model), precision="fp32", pool=EvalPoolConfig())
    task = questions(name, limit)
    requests = list(task.requests())
    began = time.monotonic()
    responses = engine.run(requests)
    seconds = time.monotonic() - began
    items = task.grade({response.id: response for response in responses})
    means = {}
    for metric in ("accuracy", "accuracy_normalised"):
        values = [v for item in items if isinstance(v := item.values.get(metric), float)]
        means[metric] = sum(values) / len(values) if values else None
    print(json.dumps({"seconds": seconds, **means}))


def peer_score(python: str, model: Path, task: dict[str, Any]) -> Score:
    command = [python, "-m", "tests.bench.lm_eval_peer", str(model), json.dumps(task)]
    return _json_of(command)


def _json_of(command: Sequence[str]) -> Score:
    done = subprocess.run(command, env=common.environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def questions(name: str, limit: int) -> McqTask:
    keys = {"answers": "one", "limit": limit, **TASKS[name]}
    return McqTask(McqConfig.model_validate(keys), 0)


def peer_task(name: str, limit: int, folder: Path) -> dict[str, Any]:
    """The harness's config of the same questions."""
    file = folder / f"{name}.jsonl"
    task = questions(name, limit)
    data = {"dataset_path": "json", "dataset_name": None, "test_split": "test"}
    data |= {"training_split": None, "validation_split": None}
    data |= {"dataset_kwargs": {"data_files": {"test": str(file.absolute())}}}
    if name == "pubmedqa":
        rows = [
            {"QUESTION": q.text, "CONTEXTS": [q.context], "final_decision": q.options[q.answer]}
            for q in task.questions
        ]
        config = {  # as the harness's own, but for where the rows are
            "task": name,
            "output_type": "multiple_choice",
            "doc_to_choice": ["yes", "no", "maybe"],
            "doc_to_target": "final_decision",
            "metric_list": [{"metric": "acc"}],
            **data,
        }
    else:
        rows = [
            _row(request, q.answer)
            for request, q in zip(_requests(task), task.questions, strict=True)
        ]
        config = {
            "task": f"medgpt_{name}",
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": "",
            "metric_list": [{"metric": metric} for metric in ("acc", "acc_norm")],
            **data,
        }
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    file.write_text("".join(lines), "utf-8")
    return config


def _requests(task: McqTask) -> list[Loglikelihood]:
    return [request for request in task.requests() if isinstance(request, Loglikelihood)]


def _row(request: Loglikelihood, answer: str) -> dict[str, Any]:
    options = list(request.options)
    return {"prompt": request.prompt, "options": options, "answer": "ABCDEFGHIJ".index(answer)}


def main() -> None:
    parser = common.options(__doc__, rounds=3)
    parser.add_argument("--limit", type=int, default=500, help="questions of a task")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--model", type=Path, help="a model folder; default: fresh weights")
    parser.add_argument("--score", choices=list(TASKS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.score:
        score(args.model, args.score, args.limit)
        return
    model = args.model or tiny_model(args.dir, args.size)
    for name in args.tasks:
        task = peer_task(name, args.limit, args.dir)
        count = len(questions(name, args.limit).questions)
        pairs = [
            (medgpt_score(model, name, args.limit), peer_score(args.peer_python, model, task))
            for _ in range(args.rounds)
        ]
        speeds = [[count / run["seconds"] for run in side] for side in zip(*pairs, strict=True)]
        for who, speed in zip(("medgpt", "lm-evaluation-harness"), speeds, strict=True):
            print(f"{name}, {who}: {common.spread(speed, '.1f')} questions/s of {count}")
        print(f"{name}, medgpt / lm-evaluation-harness: {common.spread(common.ratios(*speeds))}")
        ours, theirs = pairs[-1]
        for metric in ("accuracy", "accuracy_normalised"):
            if ours[metric] is not None and theirs[metric] is not None:
                gap = 100 * (ours[metric] - theirs[metric])
                print(
                    f"{name}, {metric}: {100 * ours[metric]:.2f} and {100 * theirs[metric]:.2f}, "
                    f"difference {gap:.2f} points",
                    flush=True,
                )


if __name__ == "__main__":
    main()

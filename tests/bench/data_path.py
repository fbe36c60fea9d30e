"""Raw dialogues to packed rows: medgpt through Ray Data beside datasets.map and TRL's packing.

`python -m tests.bench.data_path` prints rows per second, the memory of all processes together at
one and at sixteen times the corpus, and how full the packed rows are. Both sides tokenise the same
file with the chat template and the mask of the assistant's tokens, on two cores.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.bench import common

POLL_S = 0.1
TIMES = (1, 16)  # the corpus over
SIDES = ("medgpt", "datasets + TRL")


def corpus(folder: Path, times: int) -> Path:
    """Write all dialogues of sft_single `times` times, each copy with different questions."""
    file = folder / f"corpus-{times}x.jsonl"
    if not file.exists():
        result = common.rows(sorted(common.DATA.glob("*.jsonl")))
        with file.open("w", encoding="utf-8") as output:
            for copy in range(times):
                for row in result:
                    row = row | {
                        "question": f"{row['question']} {copy}" if copy else row["question"]
                    }
                    line = {"messages": common.messages(row)}
                    output.write(json.dumps(line, ensure_ascii=False) + "\n")
    return file


def with_medgpt(file: Path, base: Path, folder: Path) -> dict[str, Any]:
    """Run index, plan, and all packed rows of an epoch as a worker receives them."""
    from medgpt.cluster import ray_init
    from medgpt.config.loading import load
    from medgpt.config.stages import SFTConfig
    from medgpt.data.loader.plan import Plan
    from medgpt.data.loader.stream import training_stream
    from medgpt.runs import Run
    from medgpt.train.preparation import TOKENIZER, make_tokenizer, prepare

    run_dir = folder / "data-path"
    shutil.rmtree(run_dir, ignore_errors=True)
    command = common.medgpt_sft(file, base, run_dir)
    config = load(SFTConfig, Path(command[4]))
    ray_init.init_ray(config.cluster)
    run = Run.open("sft", config, run_dir=config.run.dir, allow_changes=False)
    make_tokenizer((run.folder / TOKENIZER).url, config)
    began = time.monotonic()
    manifest = prepare(run, config, lambda *_: None).data
    indexed = time.monotonic()
    plan = Plan(run.plan.url, global_batch_size=64, max_steps=None)
    rows = tokens = 0
    for step in training_stream(plan, run.data.url, rank=0, world_size=1, start=0):
        rows += len(step.rows)
        tokens += sum(len(row.input_ids) for row in step.rows)
    done = time.monotonic()
    return {
        "seconds": done - began,
        "index_s": indexed - began,
        "dialogues": manifest["num_samples"],
        "rows": rows,
        "tokens": tokens,
    }


def with_trl(file: Path, base: Path, folder: Path) -> dict[str, Any]:
    """Run datasets.map with two processes, then TRL's best-fit packing, read once."""
    from datasets import disable_caching, disable_progress_bars, load_dataset
    from transformers import AutoTokenizer
    from trl import pack_dataset

    disable_caching()
    disable_progress_bars()
    shutil.rmtree(folder / "datasets", ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    began = time.monotonic()
    dialogues = load_dataset(
        "json", data_files=str(file), split="train", cache_dir=str(folder / "datasets")
    )
    encoded = dialogues.map(
        encode,
        fn_kwargs={"tokenizer": tokenizer},
        num_proc=2,
        remove_columns=dialogues.column_names,
    )
    indexed = time.monotonic()
    packed = pack_dataset(encoded, common.MAX_LENGTH, "bfd", {"num_proc": 2})
    rows = tokens = 0
    for row in packed.with_format("numpy"):
        rows += 1
        tokens += len(row["input_ids"])
    done = time.monotonic()
    return {
        "seconds": done - began,
        "index_s": indexed - began,
        "dialogues": len(dialogues),
        "rows": rows,
        "tokens": tokens,
    }


def encode(row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """Encode a row like SFTTrainer with assistant_only_loss."""
    result = tokenizer.apply_chat_template(
        row["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    return {"input_ids": result["input_ids"], "assistant_masks": result["assistant_masks"]}


def run_contender(side: str, args: argparse.Namespace, times: int) -> dict[str, Any]:
    """Run one contender in its own processes; return their total peak of resident memory."""
    file = corpus(args.dir, times)
    _, base = common.workload(args.dir, args.size)
    command = [sys.executable, "-m", "tests.bench.data_path", f"--side={side}", f"--file={file}"]
    process = subprocess.Popen(
        [*command, f"--base={base}", f"--dir={args.dir}"],
        stdout=subprocess.PIPE,
        text=True,
        env=common.environment(),
    )
    usage, peak = common.Usage(process.pid), 0.0
    while process.poll() is None:
        time.sleep(POLL_S)
        peak = max(peak, usage()[1])
    assert process.stdout is not None
    result = json.loads(process.stdout.read().splitlines()[-1])
    result |= {"peak_gb": peak, "per_s": result["dialogues"] / result["seconds"]}
    print(f"  {side} {times}x: {result}", flush=True)
    return result


def main() -> None:
    parser = common.options(__doc__, rounds=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        work = with_medgpt if args.side == SIDES[0] else with_trl
        print(json.dumps(work(args.file, args.base, args.dir)))
        return
    result: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for _ in range(args.rounds):
        for times in TIMES:
            for side in SIDES:
                result.setdefault((side, times), []).append(run_contender(side, args, times))
    for times in TIMES:
        ours, theirs = ([x["per_s"] for x in result[side, times]] for side in SIDES)
        ratio = common.spread(common.ratios(ours, theirs))
        print(f"{times}x corpus, medgpt / datasets + TRL: {ratio}")
        for side in SIDES:
            memory = common.spread([x["peak_gb"] for x in result[side, times]])
            speed = common.spread([x["per_s"] for x in result[side, times]], ",.0f")
            print(f"{times}x corpus, {side}: {speed} dialogues/s, peak {memory} GiB")
    last = result["medgpt", 1][-1]
    padding = 1 - last["tokens"] / (last["rows"] * common.MAX_LENGTH)
    print(f"share of rows of {common.MAX_LENGTH} that would be padding: {padding:.2%}")


if __name__ == "__main__":
    main()

"""PPO speed: medgpt's pools beside TRL's PPOTrainer, on the same model, prompts and schedule.

`python -m tests.bench.ppo --peer-python PYTHON` prints samples per second, the ratio and what an
iteration's time goes to; PYTHON is that of an environment with `trl==1.12.0`, which still has PPO.
`--sweep` runs TRL with each number of threads and ranks instead, to see which is its best;
`--scaling` runs medgpt with one worker and with two.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench import common

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SIZES = {
    "llama": common.Size(hidden=64, layers=2, vocab=8000),
    "qwen2": common.Size(hidden=256, layers=4, vocab=8000),
}
BATCH, MINI_BATCHES, EPOCHS, TEMPERATURE = 64, 4, 4, 0.7
FIRST, LAST = 2, 8  # iterations; what comes before warms up
SHORT = (
    "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
"""A chat template that leaves room for a question in 16 tokens."""
CONFIG = """
[run]
dir = "{run}"
[model]
name = "{base}"
[[data.sources]]
name = "dialogues"
paths = ["{dialogues}"]
license = "mixed"
deny = []
[data]
max_length = {case.prompt}
validation_share = 0.0
[ppo]
rollout_batch_size = 64
global_batch_size = 16
epochs = 4
checkpoint_every = 1000000
[rollout]
max_new_tokens = {case.response}
temperature = 0.7
[reward]
model = "{reward}"
[reward.rules]
urgency = 0
dose = 0
diagnosis = 0
hotline = 0
language = 0
repetition = 0
[pools]
actor = {{ num_workers = 2, cpus_per_worker = 0.25, engine.zero_stage = 0 }}
critic = {{ cpus_per_worker = 0.25, engine.zero_stage = 0 }}
reward.cpus_per_worker = 0.25
reference.cpus_per_worker = 0.25
rollout = {{ num_workers = 2, cpus_per_worker = 0.25 }}
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """The workload of both contenders."""

    model: str
    prompt: int  # tokens
    response: int  # tokens; rows do not end early, fresh weights say an end once in 8000 tokens

    def __str__(self) -> str:
        return f"{self.model}, {self.prompt}+{self.response} tokens"

    @classmethod
    def parse(cls, text: str) -> "Case":
        model, prompt, response = text.split(":")
        return cls(model=model, prompt=int(prompt), response=int(response))


CASES = [
    Case(model=model, prompt=prompt, response=response)
    for model, (prompt, response) in product(SIZES, ((16, 32), (64, 64)))
]


@dataclass(frozen=True, kw_only=True)
class Work:
    """Files that both contenders use."""

    base: Path  # actor, reference
    reward: Path  # reward model, critic
    dialogues: Path  # JSON lines; without the answers, prompts of the case's length
    ids: Path  # the prompts as lists of token ids


def workload(folder: Path, case: Case) -> Work:
    """Made once."""
    from medgpt.models.tokenizer import load_tokenizer

    size = SIZES[case.model]
    data, _ = common.workload(folder, common.Size(hidden=64, layers=1, vocab=size.vocab))
    name = f"{case.model}-{size.hidden}x{size.layers}x{size.vocab}"
    base, reward = folder / name, folder / f"{name}-reward"
    if not (base / "config.json").exists():
        common.write_base(base, data, size, case.model)
        tokenizer = load_tokenizer(str(base))
        tokenizer.chat_template = SHORT
        tokenizer.save_pretrained(base)
    if not (reward / "score.json").exists():
        _write_reward_model(base, reward)
    dialogues = folder / f"prompts-{case.prompt}.jsonl"
    ids = dialogues.with_suffix(".ids.json")
    if not ids.exists():
        lines = data.read_text("utf-8").splitlines()
        turns = (json.loads(line)["messages"] for line in lines)
        texts = ("".join(turn["content"] for turn in row) for row in turns)  # questions are short
        rows = dict(_of_length(texts, case.prompt, load_tokenizer(str(base)), BATCH * LAST))
        asked = [common.messages({"question": text, "answer": "-"}) for text in rows]
        lines = [json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in asked]
        dialogues.write_text("".join(lines), "utf-8")
        ids.write_text(json.dumps(list(rows.values())))
    return Work(base=base, reward=reward, dialogues=dialogues, ids=ids)


def _write_reward_model(base: Path, folder: Path) -> None:
    """Write the base with a fresh value head in the format of `medgpt reward`."""
    from transformers import AutoModelForSequenceClassification

    from medgpt.models.tokenizer import load_tokenizer
    from medgpt.models.tokenizer_compat import tokenizer_fingerprint
    from medgpt.models.value_model import RewardModelInfo

    tokenizer = load_tokenizer(str(base))
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    RewardModelInfo(
        mean=0.0, std=1.0, normalised_on="nothing", speech=tokenizer_fingerprint(tokenizer)
    ).write(folder)


def medgpt(args: argparse.Namespace, case: Case, **overrides: object) -> common.Window:
    """`medgpt ppo`: two workers in the rollout and actor pools, one in others, a thread each."""
    work, run = workload(args.dir, case), args.dir / "medgpt-ppo"
    shutil.rmtree(run, ignore_errors=True)
    config = args.dir / "medgpt-ppo.toml"
    config.write_text(
        CONFIG.format(
            run=run.absolute(),
            base=work.base.absolute(),
            reward=work.reward.absolute(),
            dialogues=work.dialogues.absolute(),
            case=case,
        ),
        "utf-8",
    )
    changes = [f"{key}={value}" for key, value in overrides.items()]
    command = [sys.executable, "-m", "medgpt", "ppo", str(config), *changes]
    return _measure(command, run / "metrics.jsonl")


def trl(args: argparse.Namespace, case: Case, *, ranks: int = 2, threads: int = 1) -> common.Window:
    """PPOTrainer on `ranks` processes, one optimizer step for each mini-batch."""
    work, metrics = workload(args.dir, case), args.dir / "trl-ppo" / "metrics.jsonl"
    metrics.parent.mkdir(exist_ok=True)
    config = {
        "per_device_train_batch_size": BATCH // ranks,  # TRL cuts mini-batches out of it
        "gradient_accumulation_steps": 1,
        "num_mini_batches": MINI_BATCHES,
        "num_ppo_epochs": EPOCHS,
        "total_episodes": BATCH * LAST,
        "local_rollout_forward_batch_size": BATCH // ranks,
        "response_length": case.response,
        "temperature": TEMPERATURE,
        "max_grad_norm": 1.0,
    }
    module = ["-m", "tests.bench.trl_ppo"]
    if ranks > 1:
        module = common.torchrun("tests.bench.trl_ppo", ranks=ranks)[1:]
    arguments = [work.base, work.reward, work.ids, metrics, json.dumps(config)]
    command = [args.peer_python, *module, *map(str, arguments), "--threads", str(threads)]
    return _measure(command, metrics, OMP_NUM_THREADS=str(threads))


def _measure(command: Sequence[str], metrics: Path, **env: str) -> common.Window:
    return common.measure(
        command, metrics, first=FIRST, last=LAST, env=env, counted="time/iteration_s"
    )


def sweep(args: argparse.Namespace) -> None:
    """Run TRL on one process with one or two threads, and on two processes."""
    for case, (ranks, threads) in product(args.cases, ((1, 1), (1, 2), (2, 1))):
        window = trl(args, case, ranks=ranks, threads=threads)
        print(
            f"{case}, {ranks} ranks of {threads} threads: {samples_per_s(window):.1f} samples/s; "
            f"{phases(args.dir / 'trl-ppo' / 'metrics.jsonl')}",
            flush=True,
        )


def samples_per_s(window: common.Window) -> float:
    return (LAST - FIRST) * BATCH / window.wall_s


def phases(metrics: Path) -> str:
    """Return the median seconds of the phases of an iteration."""
    steps = common.read_steps(metrics, "time/iteration_s")
    lines = [line for step, line in steps.items() if step > FIRST]
    names = [key for key in lines[0] if key.startswith("time/")]
    parts = ((key, statistics.median(line[key] for line in lines)) for key in names)
    return ", ".join(f"{key[5:-2]} {seconds:.2f} s" for key, seconds in parts)


def _of_length(
    texts: Iterator[str], length: int, tokenizer: "PreTrainedTokenizerFast", count: int
) -> Iterator[tuple[str, list[int]]]:
    """Yield `count` texts, cut so that their prompts have `length` tokens, with their ids."""
    from medgpt.data.sources.records import Message
    from medgpt.data.tokenized.chat_template import generation_prompt_ids

    num_found = 0
    for text in texts:
        low, high = 1, len(text)  # more characters, more tokens
        while low < high:
            middle = (low + high) // 2
            ids = generation_prompt_ids(tokenizer, [Message("user", text[:middle])])
            low, high = (middle + 1, high) if len(ids) < length else (low, middle)
        ids = generation_prompt_ids(tokenizer, [Message("user", text[:low])])
        if len(ids) == length:
            num_found += 1
            yield text[:low], ids
        if num_found == count:
            return
    raise RuntimeError(f"only {num_found} prompts of {length} tokens in the data, {count} needed")


def compare(args: argparse.Namespace, case: Case) -> None:
    """Run alternating rounds and print the times of the phases of the last ones."""
    speeds: dict[str, list[float]] = {"medgpt": [], "TRL": []}
    for _ in range(args.rounds):
        speeds["medgpt"].append(samples_per_s(medgpt(args, case)))
        speeds["TRL"].append(samples_per_s(trl(args, case)))
    for name, values in speeds.items():
        print(f"{case}, {name}: {common.spread(values, '.1f')} samples/s")
    print(f"{case}, medgpt / TRL: {common.spread(common.ratios(*speeds.values()))}")
    print(f"{case}, medgpt: {phases(args.dir / 'medgpt-ppo' / 'metrics.jsonl')}")
    print(f"{case}, TRL: {phases(args.dir / 'trl-ppo' / 'metrics.jsonl')}", flush=True)


def scale(args: argparse.Namespace, case: Case) -> None:
    """Compare two workers in the actor and rollout pools with one."""
    speeds: list[list[float]] = [[], []]
    for _ in range(args.rounds):
        for workers, num_found in zip((1, 2), speeds, strict=True):
            overrides = {f"pools.{role}.num_workers": workers for role in ("actor", "rollout")}
            num_found.append(samples_per_s(medgpt(args, case, **overrides)))
    ratio = common.spread(common.ratios(speeds[1], speeds[0]))
    print(f"{case}, two workers / one in the actor and rollout pools: {ratio}", flush=True)


def main() -> None:
    parser = common.options(__doc__, rounds=3)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--cases", nargs="+", type=Case.parse, default=CASES, metavar="MODEL:P:T")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--scaling", action="store_true", help="medgpt alone, with more workers")
    args = parser.parse_args()
    if args.sweep:
        sweep(args)
        return
    for case in args.cases:
        (scale if args.scaling else compare)(args, case)


if __name__ == "__main__":
    main()

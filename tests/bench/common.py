"""Shared by the benchmarks: the workload, the timing of a trainer, ratios with their spread.

A contender is a command that trains and appends {"step", "time_s", "train/tokens"} to a file, a
line per optimizer step, as medgpt's metrics.jsonl. It is watched from outside: tokens per second
come from its own lines, CPU time and memory from the operating system.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import psutil

DATA = Path(os.environ.get("MEDGPT_SHARED_DATA", "../shared/data")) / "sft_single"
MAX_LENGTH = 512
POLL_S = 0.2
MEMORY_EVERY_S = 2.0  # looking at all processes takes CPU time from the contenders
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model to train."""

    hidden: int
    layers: int
    vocab: int

    @classmethod
    def parse(cls, text: str) -> "Size":
        hidden, layers, vocab = map(int, text.split("x"))
        return cls(hidden=hidden, layers=layers, vocab=vocab)

    def flops(self, tokens: float, targets: float) -> float:
        """Return the FLOPs of the matrix products of forward and backward pass, without
        attention."""
        ff = self.hidden * 11 // 4
        block = 4 * self.hidden**2 + 3 * self.hidden * ff
        return 6 * (self.layers * block * tokens + self.hidden * self.vocab * targets)


@dataclass(frozen=True, kw_only=True)
class Window:
    """Tokens and resources of a contender between two of its steps."""

    tokens: float
    targets: float  # tokens with a loss; 0 where the contender does not tell
    wall_s: float
    cpu_s: float  # of its process and everything that came from it
    peak_gb: float  # most resident memory of all of them together

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.wall_s


def options(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the arguments of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--dir", type=Path, default=Path("runs/bench"), help="working folder")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--size", type=Size.parse, default="256x4x8000", metavar="HxLxV")
    parser.add_argument("--results", type=Path, help="keep measurements here, and continue them")
    return parser


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of a contender: one thread per process, cached bytecode."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return inherited | THREADS | changes


# ---- workload ----


def rows(files: Iterable[Path], limit: int | None = None) -> list[dict[str, str]]:
    """{"question", "answer"} of both sources, `limit` in all, as many of one as of the other."""
    files = list(files)
    share = None if limit is None else limit // len(files)
    return [
        _row(json.loads(line))
        for file in files
        for line in islice(file.read_text("utf-8").splitlines(), share)
    ]


def _row(row: dict[str, str]) -> dict[str, str]:
    question = row.get("instruction") or row.get("ask") or row["title"]
    return {"question": question, "answer": row.get("output") or row["answer"]}


def workload(folder: Path, size: Size, *, dialogues: int = 4000) -> tuple[Path, Path]:
    """(dialogues as JSON lines, a base model with fresh weights); made once."""
    data, base = (
        folder / "dialogues.jsonl",
        folder / f"base-{size.hidden}x{size.layers}x{size.vocab}",
    )
    if not data.exists():
        folder.mkdir(parents=True, exist_ok=True)
        chosen = rows(sorted(DATA.glob("*.jsonl")), dialogues)
        lines = [json.dumps({"messages": messages(r)}, ensure_ascii=False) + "\n" for r in chosen]
        data.write_text("".join(lines), "utf-8")
    if not (base / "config.json").exists():
        write_base(base, data, size)
    return data, base


def messages(row: dict[str, str]) -> list[dict[str, str]]:
    roles = (("user", "question"), ("assistant", "answer"))
    return [{"role": role, "content": row[key]} for role, key in roles]


def write_base(base: Path, data: Path, size: Size, kind: str = "qwen2") -> None:
    """A base model with fresh weights and a tokenizer trained on the messages in `data`."""
    from medgpt.config.model import ArchitectureConfig, ModelConfig, TokenizerConfig
    from medgpt.data.tokenized.chat_template import prepare_chat_tokenizer
    from medgpt.models.load import SpecialTokenIds, build_model
    from medgpt.models.tokenizer import train_tokenizer

    lines = data.read_text("utf-8").splitlines()
    texts = (m["content"] for line in lines for m in json.loads(line)["messages"])
    config = TokenizerConfig(mode="train", vocab_size=size.vocab)
    tokenizer = prepare_chat_tokenizer(train_tokenizer(texts, config, "bpe"))
    architecture = ArchitectureConfig.model_validate(
        {
            "kind": kind,
            "hidden_size": size.hidden,
            "num_layers": size.layers,
            "intermediate_size": size.hidden * 11 // 4,
        }
    )
    model = build_model(
        ModelConfig(architecture=architecture),
        head_kind="clm",
        vocab_size=len(tokenizer),
        special_ids=SpecialTokenIds(eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id),
        seed=0,
    )
    tokenizer.save_pretrained(base)
    model.save_pretrained(base)


def medgpt_sft(data: Path, base: Path, run: Path, **overrides: object) -> list[str]:
    """Return the command that fine-tunes on `data` with two workers, without evaluation."""
    config = run.with_suffix(".toml")
    config.write_text(
        f"""
run.dir = "{run.absolute()}"
model.name = "{base.absolute()}"
[[data.sources]]
name = "dialogues"
paths = ["{data.absolute()}"]
license = "mixed"
deny = []
[data]
shard_mb = 4
max_length = {MAX_LENGTH}
validation_share = 0.0
[train]
eval_every = 1000000
checkpoint_every = 1000000
log_every = 1000000
[engine]
zero_stage = 0  # optimizer states in full on every worker, as the peers have them
[cluster]
num_workers = 2
""",
        "utf-8",
    )
    changes = [f"{key}={value}" for key, value in overrides.items()]
    return [sys.executable, "-m", "medgpt", "sft", str(config), *changes]


def torchrun(module: str, *arguments: object, ranks: int = 2) -> list[str]:
    """Return the command that runs `module` on `ranks` processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", module]
    return [*launcher, *rendezvous, *map(str, arguments)]


# ---- measurement ----


def measure(
    command: Sequence[str],
    metrics: Path,
    *,
    first: int,
    last: int,
    env: Mapping[str, str] | None = None,
    counted: str = "train/tokens",
) -> Window:
    """Run `command` to its end and look at steps `first` + 1 to `last`.

    Args:
        counted: a number that every step's line has; the window's `tokens` are its sum.

    Raises:
        RuntimeError: it failed or ended too early, with the end of what it said.
    """
    metrics.unlink(missing_ok=True)
    log = Path(f"{metrics.parent}.log")
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment(**(env or {}))
        )
        usage, cpu, peak, looked = Usage(process.pid), {}, 0.0, 0.0
        while process.poll() is None:
            time.sleep(POLL_S)
            done = _num_steps(metrics, counted)
            reached = [step for step in (first, last) if step not in cpu and done >= step]
            if reached or time.monotonic() - looked > MEMORY_EVERY_S:
                cpu_s, gb = usage()
                peak, looked = max(peak, gb), time.monotonic()
                cpu |= dict.fromkeys(reached, cpu_s)
    lines = read_steps(metrics, counted)
    if process.returncode or last not in lines:
        raise RuntimeError(f"{' '.join(command)}\n{log.read_text()[-3000:]}")
    inside = [lines[step] for step in range(first + 1, last + 1)]
    return Window(
        tokens=sum(line[counted] for line in inside),
        targets=sum(line.get("train/target_tokens", 0) for line in inside),
        wall_s=lines[last]["time_s"] - lines[first]["time_s"],
        cpu_s=cpu[last] - cpu[first],
        peak_gb=peak,
    )


class Usage:
    """CPU seconds and memory of a process and its descendants, including ended ones."""

    def __init__(self, pid: int) -> None:
        self.root = psutil.Process(pid)
        self.cpu: dict[tuple[int, float], float] = {}

    def __call__(self) -> tuple[float, float]:
        """(CPU seconds until now, GiB resident now; pages in shared memory count once each user)"""
        resident = 0
        try:
            processes = [self.root, *self.root.children(recursive=True)]
        except psutil.NoSuchProcess:
            processes = []
        for process in processes:
            try:
                times, memory = process.cpu_times(), process.memory_info()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            self.cpu[process.pid, process.create_time()] = times.user + times.system
            resident += memory.rss - memory.shared
        return sum(self.cpu.values()), resident / 2**30


def _num_steps(metrics: Path, counted: str) -> int:
    return metrics.read_bytes().count(f'"{counted}"'.encode()) if metrics.exists() else 0


def read_steps(metrics: Path, counted: str = "train/tokens") -> dict[int, dict[str, float]]:
    """Return the metrics line of each step."""
    lines = map(json.loads, metrics.read_text("utf-8").splitlines()) if metrics.exists() else ()
    return {line["step"]: line for line in lines if counted in line}


def alternate(
    contenders: Mapping[str, Callable[[], Window]], *, rounds: int, results: Path | None = None
) -> dict[str, list[Window]]:
    """Run each contender in turn, `rounds` times, after the windows stored in `results`."""
    windows: dict[str, list[Window]] = {name: [] for name in contenders}
    if results is not None and results.exists():
        for line in map(json.loads, results.read_text("utf-8").splitlines()):
            windows[line.pop("name")].append(Window(**line))
    for _ in range(rounds):
        for name, run in contenders.items():
            window = run()
            windows[name].append(window)
            print(
                f"  {name}: {window.tokens_per_s:,.0f} tokens/s, {window.wall_s:.1f} s, "
                f"{window.cpu_s:.1f} CPU-s, load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
            if results is not None:
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"name": name, **asdict(window)}) + "\n")
    return windows


# ---- figures ----


def spread(values: Sequence[float], form: str = ".2f", *, unit: str = "rounds") -> str:
    """`median (lowest-highest, n rounds)`"""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:{form}} ({low:{form}}-{high:{form}}, {len(values)} {unit})"


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the ratio of each round, so that a slow phase of the machine affects both sides."""
    return [a / b for a, b in zip(above, below, strict=True)]


def gemm_gflops(processes: int | None = None, *, seconds: float = 2.0) -> float:
    """Return the total fp32 speed of this many single-threaded processes; default: one per core."""
    code = (
        "import time, torch; torch.set_num_threads(1); a = torch.randn(1024, 1024); n = 0\n"
        f"[a @ a for _ in range(5)]; t = time.time()\nwhile time.time() - t < {seconds}:\n"
        " a @ a; n += 1\nprint(n * 2 * 1024**3 / (time.time() - t) / 1e9)"
    )
    command = [sys.executable, "-c", code]
    count = processes or os.cpu_count() or 1
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    return sum(float(process.communicate()[0]) for process in running)

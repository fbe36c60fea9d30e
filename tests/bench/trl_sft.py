"""The peer: TRL's SFTTrainer on the benchmark's dialogues. Started by sft.py, also with torchrun.

Writes a line per optimizer step, with the tokens that TRL itself counts: none of padding.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


class MetricsCallback(TrainerCallback):
    """Appends the time and the tokens of every step."""

    def __init__(self, file: Path) -> None:
        self.file, self.tokens, self.began = file, 0, time.monotonic()
        self.trainer: SFTTrainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        total = int(self.trainer._total_train_tokens)
        line = {
            "step": state.global_step,
            "time_s": time.monotonic() - self.began,
            "train/tokens": total - self.tokens,
        }
        self.tokens = total
        if state.is_world_process_zero:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("base")
    parser.add_argument("metrics", type=Path)
    parser.add_argument("config", help="JSON: arguments of SFTConfig")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = MetricsCallback(args.metrics)
    config = SFTConfig(
        output_dir=str(args.metrics.with_suffix("")),
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        assistant_only_loss=True,
        **json.loads(args.config),
    )
    trainer = SFTTrainer(
        model=args.base,
        args=config,
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        callbacks=[lines],
    )
    lines.trainer = trainer
    trainer.train()
    sys.stdout.flush()
    os._exit(0)  # a thread that still runs may abort the interpreter's end, which is not timed


if __name__ == "__main__":
    main()

"""The peer: PPOTrainer of TRL 1.12.0, the last release that has one. Started by ppo.py.

Writes a line per iteration, with the seconds that its phases took. It runs in an environment of its
own, without medgpt.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class MetricsCallback(TrainerCallback):
    """Appends the end time and the phases of every iteration."""

    def __init__(self, file: Path) -> None:
        self.file, self.began = file, time.monotonic()
        self.marks: dict[str, float] = {}
        self.last = self.before = self.began

    def mark(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `function` so that a phase of this name ends after it."""

        def marked(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            now = time.monotonic()
            self.marks[name] = now - self.last
            self.last = now
            return result

        return marked

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        line = {
            "step": state.global_step,
            "time_s": now - self.began,
            "time/iteration_s": now - self.before,
            **{f"time/{name}_s": seconds for name, seconds in self.marks.items()},
            "time/update_s": now - self.last,
        }
        self.last = self.before = now
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", help="actor and reference")
    parser.add_argument("reward", help="reward model and critic")
    parser.add_argument("prompts", type=Path, help="JSON: lists of token ids, all of one length")
    parser.add_argument("metrics", type=Path)
    parser.add_argument("config", help="JSON: arguments of PPOConfig")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    prompts = json.loads(args.prompts.read_text())
    config = PPOConfig(
        output_dir=str(args.metrics.with_suffix("")),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **json.loads(args.config),
    )
    lines = MetricsCallback(args.metrics)
    ppo_trainer.batch_generation = lines.mark("generate", ppo_trainer.batch_generation)
    ppo_trainer.masked_whiten = lines.mark("score", ppo_trainer.masked_whiten)  # of advantages
    trainer = PPOTrainer(
        args=config,
        processing_class=AutoTokenizer.from_pretrained(args.base),
        model=AutoModelForCausalLM.from_pretrained(args.base),
        ref_model=AutoModelForCausalLM.from_pretrained(args.base),
        reward_model=AutoModelForSequenceClassification.from_pretrained(args.reward, num_labels=1),
        value_model=AutoModelForSequenceClassification.from_pretrained(args.reward, num_labels=1),
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in prompts]),
        data_collator=lambda batch: {"input_ids": torch.tensor([r["input_ids"] for r in batch])},
        callbacks=[lines],
    )
    lines.last = lines.before = time.monotonic()
    trainer.train()
    sys.stdout.flush()
    os._exit(0)  # a thread that still runs may abort the interpreter's end, which is not timed


if __name__ == "__main__":
    main()

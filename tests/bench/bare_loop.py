"""The baseline of overhead.py: plain PyTorch on two gloo ranks, with batches in memory.

Same model code, optimizer and global batches as medgpt; no Ray, no DeepSpeed, no metrics but a
line per step.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from medgpt.config.model import ModelConfig
from medgpt.config.train import OptimizerConfig
from medgpt.data.loader.batch import PackedBatch
from medgpt.data.loader.collate import causal_batch
from medgpt.data.loader.plan import Plan
from medgpt.data.loader.stream import assemble_rows, unpack_rows
from medgpt.engine.engine import parameter_groups
from medgpt.engine.schedule import learning_rate
from medgpt.models.language_model import LanguageModel
from medgpt.models.load import SpecialTokenIds, build_model
from medgpt.runs import Run


def batches(plan: Plan, data_url: str, micro: int) -> list[list[PackedBatch]]:
    """Return this rank's micro-batches of every step, `micro` rows each, from the plan of a medgpt
    run."""
    steps: dict[int, list] = {}
    for table in plan.read(rank=dist.get_rank(), world_size=dist.get_world_size(), start=0):
        packed = assemble_rows(table, url=data_url, split="train", version=plan.data_version)
        for step, row in unpack_rows(packed):
            steps.setdefault(step, []).append(row)
    return [
        [causal_batch(rows[i : i + micro]) for i in range(0, len(rows), micro)]
        for _, rows in sorted(steps.items())
    ]


def flat_gradients(module: nn.Module) -> Tensor:
    """Return one buffer with all gradients, so that one call reduces them."""
    params = [p for p in module.parameters() if p.requires_grad]
    flat = torch.zeros(sum(p.numel() for p in params))
    for param, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        param.grad = part.view_as(param)
    return flat


def train(args: argparse.Namespace) -> None:
    config = OptimizerConfig()
    run = Run(args.run)
    plan = Plan(run.plan.url, global_batch_size=args.rows, max_steps=args.steps)
    steps = batches(plan, run.data.url, args.micro)
    module = LanguageModel(
        build_model(
            ModelConfig(name=args.base),
            head_kind="clm",
            vocab_size=0,
            special_ids=SpecialTokenIds(),
            seed=0,
        )
    )
    optimizer = torch.optim.AdamW(
        parameter_groups(module, config.weight_decay),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    gradients = flat_gradients(module)
    began = time.monotonic()
    for step, micro_batches in enumerate(steps):
        counts = torch.tensor(
            [
                sum(batch.input_ids.numel() for batch in micro_batches),
                sum(batch.num_targets for batch in micro_batches),
            ]
        )
        dist.all_reduce(counts)
        for batch in micro_batches:
            module(batch, num_tokens=counts[1]).backward()
        dist.all_reduce(gradients)
        gradients *= min(1.0, config.max_grad_norm / (float(gradients.norm()) + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, config)
        optimizer.step()
        gradients.zero_()
        assert math.isfinite(float(gradients.sum()))
        if dist.get_rank() == 0:
            line = {
                "step": step + 1,
                "time_s": time.monotonic() - began,
                "train/tokens": int(counts[0]),
                "train/target_tokens": int(counts[1]),
            }
            with args.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", help="of medgpt, on the same steps")
    parser.add_argument("base")
    parser.add_argument("metrics", type=Path)
    for name in ("rows", "micro", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    train(parser.parse_args())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

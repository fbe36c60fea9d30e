"""A search over a model of a few thousand weights that is rewarded for Latin letters."""

import json
from collections.abc import Sequence
from pathlib import Path

from medgpt.config.loading import load
from medgpt.config.tune import TuneStageConfig
from medgpt.rlhf.rewards.reward_sample import RewardSample

BASE = """
[run]
dir = "{folder}/alone"
[model]
name = "{base}"
[data]
max_length = 64
[[data.sources]]
name = "s"
paths = ["{folder}/prompts.jsonl"]
license = "none"
kind = "prompt"
[ppo]
max_iterations = 4
prompt_epochs = 4
rollout_batch_size = 8
global_batch_size = 4
micro_batch_tokens = 128
[reward]
score_weight = 0.0
rules = {{ urgency = 0, dose = 0, diagnosis = 0, hotline = 0, language = 0, repetition = 0 }}
functions = [{{ name = "letters", path = "tests.tune.cases:letters" }}]
[judge]
every = 2
triage = 12
max_new_tokens = 4
[rollout]
max_new_tokens = 8
[optimizer]
learning_rate = 1e-3
[pools]
actor = {{ cpus_per_worker = 0.2, engine = {{ zero_stage = 0 }} }}
critic = {{ cpus_per_worker = 0.2, engine = {{ zero_stage = 0 }} }}
reward = {{ cpus_per_worker = 0.2 }}
reference = {{ cpus_per_worker = 0.2 }}
rollout = {{ cpus_per_worker = 0.2 }}
"""
SEARCH = """
base = "{folder}/base.toml"
[run]
dir = "{folder}/search"
[search]
{keys}
[tune]
num_trials = 4
[check]
seeds = 2
"""
KEYS = """
"ppo.kl_coef" = { loguniform = [1e-3, 0.3] }
"optimizer.learning_rate" = { loguniform = [1e-4, 1e-2] }
"""
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def letters(samples: Sequence[RewardSample]) -> list[float | None]:
    """Share of an answer's characters that are Latin letters."""
    return [
        sum(c in LETTERS for c in sample.text.lower()) / max(1, len(sample.text))
        for sample in samples
    ]


def search_config(
    folder: Path, base: Path, *overrides: str, keys: str = KEYS, of_base: str = ""
) -> TuneStageConfig:
    """Four trials of four iterations, judged at every other one."""
    prompts = [json.dumps({"prompt": f"咳{number}天?"}) + "\n" for number in range(16)]
    (folder / "prompts.jsonl").write_text("".join(prompts), "utf-8")
    for name, text in (("base", BASE), ("search", SEARCH)):
        filled = text.format(folder=folder, base=base, keys=keys)
        (folder / f"{name}.toml").write_text(filled, "utf-8")
    base_overrides = [f"overrides={of_base}"] if of_base else []
    return load(TuneStageConfig, folder / "search.toml", [*base_overrides, *overrides])

"""Invalid PPO configs are refused with key, value and remedy."""

from typing import Any

import pytest

from medgpt.config.base import ConfigError
from medgpt.config.loading import validate
from medgpt.config.ppo import PPOStageConfig


def config(**sections: Any) -> PPOStageConfig:
    tree: dict[str, Any] = {
        "run": {"dir": "/runs/ppo"},
        "model": {"name": "/sft/model"},
        "data": {"sources": [{"name": "a", "paths": ["/a.jsonl"], "license": "MIT"}]},
        "reward": {"model": "/reward/model"},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return validate(PPOStageConfig, tree)


def test_the_defaults_and_good_choices_pass():
    config()
    good = config(ppo={"rollout_batch_size": 12, "global_batch_size": 4, "clip_range_high": 0.28})
    assert (good.ppo.rollout_batch_size, good.ppo.clip_range_high) == (12, 0.28)
    config(pools={"rollout": {"num_workers": 512}, "actor": {"num_workers": 128}})
    config(model={"lora": {"rank": 4}}, pools={"reference_in_actor": True})


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"ppo": {"rollout_batch_size": 3, "global_batch_size": 4}},
            r"rollout_batch_size=3 must be a multiple of global_batch_size=4; 4 would do",
        ),
        (
            {"ppo": {"clip_range": 0.3, "clip_range_high": 0.2}},
            r"clip_range_high=0.2 is below clip_range=0.3; raise it or leave it out",
        ),
        (
            {"pools": {"reward": {"num_workers": 513}}},
            r"ppo.rollout_batch_size=512 is less than pools.reward.num_workers=513",
        ),
        ({"model": {"lora": {"rank": 4, "dropout": 0.1}}}, r"lora.dropout must be 0:"),
        ({"critic": {"lora": {"rank": 4, "dropout": 0.1}}}, r"lora.dropout must be 0:"),
        ({"pools": {"reference_in_actor": True}}, r"reference_in_actor=true needs adapters"),
        (
            {"model": {"name": None, "architecture": {}}},
            r"model.name is unset; set it to the model that medgpt sft wrote",
        ),
        ({"reward": {"model": None}}, r"reward.model is unset; .* reward.score_weight=0"),
    ],
)
def test_invalid_configs_are_refused(sections, words):
    with pytest.raises(ConfigError, match=words):
        config(**sections)

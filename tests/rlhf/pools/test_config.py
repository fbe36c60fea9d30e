"""Invalid pool configs are refused with key, value and remedy."""

import pytest

from medgpt.config.base import ConfigError
from medgpt.config.loading import validate
from medgpt.config.pools import PoolsConfig


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"reward": {"zero_stage": 2}}, r"reward.zero_stage=2"),
        ({"reward": {"num_workers": 0}}, r"reward.num_workers=0"),
        ({"actor": {"share_with": "actor"}}, "name a role that has bundles of its own"),
        (
            {"reward": {"share_with": "reference"}, "reference": {"share_with": "actor"}},
            r"pools.reward.share_with=reference: name a role that has bundles of its own",
        ),
        (
            {"reward": {"share_with": "reference", "num_workers": 2}},
            r"pools.reward.num_workers=2 must equal pools.reference.num_workers=1",
        ),
        (
            {
                "reward": {"share_with": "reference", "gpus_per_worker": 1, "offload": True},
                "reference": {"gpus_per_worker": 1},
            },
            r"set pools.reward.offload=true and pools.reference.offload=true",
        ),
        ({"actor": {"offload": True}}, r"pools.actor.offload=true: only a whole model"),
        (
            {"actor": {"engine": {"zero_stage": 0, "offload_optimizer": True}}},
            r"actor.engine: offload_optimizer=true needs zero_stage 1, 2 or 3, not 0",
        ),
        (
            {"reward": {"share_with": "reference"}, "reference_in_actor": True},
            r"pools.reward.share_with=reference: it has no pool with reference_in_actor=true",
        ),
        (
            {"reward": {"offload": True, "zero_stage": 3}},
            r"pools.reward.offload=true: .* or zero_stage to 0",
        ),
    ],
)
def test_invalid_configs_are_refused(tree: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate(PoolsConfig, tree)


def test_reward_and_reference_can_share_a_gpu() -> None:
    one = {"gpus_per_worker": 1, "offload": True}
    pools = validate(PoolsConfig, {"reward": {"share_with": "reference", **one}, "reference": one})
    assert pools.role("reward").share_with == "reference"

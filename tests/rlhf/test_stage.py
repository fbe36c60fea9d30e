"""What the user can repair is told before data is prepared and before any worker starts."""

from pathlib import Path

import pytest
import ray

from medgpt.config import ConfigError, PPOStageConfig
from medgpt.config.pools import ROLES
from medgpt.metrics import ConsoleReporter
from medgpt.rlhf.checks import check_models
from medgpt.rlhf.stage import make_pools, run_ppo_stage
from medgpt.runs import Folder
from tests.models.packing import changed_copy
from tests.rlhf.cases import ppo_config

HALVES = tuple(f"pools.{role}.cpus_per_worker=0.5" for role in ROLES)
IN_ACTOR = ("pools.reference_in_actor=true", "model.lora.rank=2")


def refused(config: PPOStageConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run_ppo_stage(config)
    run = Folder(config.run.dir)
    assert not (run / "data").names()
    assert not (run / "tokenizer").names()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_pools_that_leave_no_room_for_a_data_task_are_refused(base: Path, tmp_path: Path) -> None:
    """Four pools of a CPU each on the session's four."""
    config = ppo_config(tmp_path, base, *IN_ACTOR)
    pools = make_pools(config, 1, ConsoleReporter("ppo"))
    assert pools.data_cpus == config.cluster.data_cpus == 1
    assert ray.cluster_resources()["CPU"] == 4
    refused(config, r"can never be placed: the pools before it and data tasks take 4 CPU of 4")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_too_few_positions_are_told_before_anything_is_prepared(base: Path, tmp_path: Path) -> None:
    config = ppo_config(tmp_path, base, "rollout.max_new_tokens=500", *HALVES)
    refused(config, r"data.max_length=32 and rollout.max_new_tokens=500 make .* 532 .* model.name=")


def test_questions_of_the_judge_that_cannot_be_read_are_told_first(
    base: Path, tmp_path: Path
) -> None:
    refused(
        ppo_config(tmp_path, base, "judge.every=1", f'judge.key_points="{tmp_path}/none.jsonl"'),
        r"none\.jsonl",
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ("data.max_length=505",),
            r"sequences of up to 513 tokens, model.name=.* has 512 positions",
        ),
        (
            ("judge.every=1", "judge.max_new_tokens=512"),
            r"judge.max_new_tokens=512 and its longest",
        ),
        (("critic.model={short}",), r"critic.model=.*short has 36 positions"),
        (("reward.model={short}", "reward.score_weight=1.0"), r"reward.model=.*short has 36"),
        (
            ("judge.every=1", "judge.max_new_tokens=8", "judge.model={short}"),
            r"judge.model=.*short has 36 positions",
        ),
    ],
)
def test_every_model_must_read_what_it_will_be_given(
    base: Path, short: Path, tmp_path: Path, overrides: tuple[str, ...], words: str
) -> None:
    check_models(ppo_config(tmp_path, base))
    with pytest.raises(ConfigError, match=words):
        check_models(ppo_config(tmp_path, base, *(o.format(short=short) for o in overrides)))


@pytest.fixture(scope="module")
def short(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model with 36 positions, where rollouts have up to 40 tokens."""
    folder = tmp_path_factory.mktemp("short") / "short"
    return changed_copy(base, folder, max_position_embeddings=36)

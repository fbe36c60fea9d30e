"""PPO from config to finished run on real pools: what one process would compute, on a real Ray; and
what the user can repair, told before data is prepared and before any worker starts."""

from functools import partial
from pathlib import Path

import pytest
import ray

from medgpt.artifacts import Folder, committed
from medgpt.config.base import ConfigError
from medgpt.config.pools import ROLES
from medgpt.config.ppo import PPOStageConfig
from medgpt.data.loader.plan import Plan
from medgpt.metrics import ConsoleReporter
from medgpt.rlhf.preflight import check_models
from medgpt.rlhf.prompts import prompt_stream
from medgpt.rlhf.ptx import ptx_stream
from medgpt.rlhf.setup import build_pools
from medgpt.runs import Run
from medgpt.stages.ppo import train_ppo
from tests.models.tiny_models import copy_with_changed_config
from tests.rlhf.cases import ppo_config, save_reward_model
from tests.rlhf.inline import comparable_metrics, make_ppo
from tests.rlhf.test_ppo import NO_RULES

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
ITERATIONS = 2
SHARED = """pools={
    actor={cpus_per_worker=0.3,engine={zero_stage=2,offload_optimizer=true}},
    critic={cpus_per_worker=0.3,engine={zero_stage=3}},
    reward={cpus_per_worker=0.3,share_with="reference",offload=true},
    reference={cpus_per_worker=0.3,offload=true},
    rollout={cpus_per_worker=0.3,offload=true}}"""
WIDE = """pools={
    actor={num_workers=2,cpus_per_worker=0.3,engine={zero_stage=2}},
    critic={num_workers=2,cpus_per_worker=0.3,engine={zero_stage=3}},
    reward={num_workers=2,cpus_per_worker=0.3,zero_stage=3},
    reference={num_workers=2,cpus_per_worker=0.3,zero_stage=3},
    rollout={num_workers=2,cpus_per_worker=0.3}}"""
HALVES = tuple(f"pools.{role}.cpus_per_worker=0.5" for role in ROLES)
IN_ACTOR = ("pools.reference_in_actor=true", "model.lora.rank=2")


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward_model(base, tmp_path_factory.mktemp("saved") / "reward")


@pytest.fixture(scope="module")
def short(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model with 36 positions; rollouts have up to 40 tokens."""
    folder = tmp_path_factory.mktemp("short") / "short"
    return copy_with_changed_config(base, folder, max_position_embeddings=36)


def config_of(
    folder: Path, base: Path, saved: Path, corpus: Path, *overrides: str
) -> PPOStageConfig:
    """Two iterations with a reward model and with PPO-ptx."""
    folder.mkdir()
    talk = f"{{name='talk',paths=['{corpus}/sft'],license='Apache-2.0'}}"
    return ppo_config(
        folder,
        base,
        NO_RULES,
        "reward.score_weight=1.0",
        f"reward.model={saved}",
        f"data={{max_length=160,sources=[{talk.replace('talk', 'asked')}]}}",
        f"ptx={{batch_size=4,data={{max_length=256,sources=[{talk}]}}}}",
        f"ppo.max_iterations={ITERATIONS}",
        *overrides,
    )


def in_one_process(run: Run, config: PPOStageConfig) -> list[dict[str, float]]:
    """Compute the metrics of `run` with all roles in this process."""
    plan = Plan(run.plan.url, global_batch_size=12, max_steps=ITERATIONS)
    ppo = make_ppo(
        config,
        ITERATIONS,
        prompts=partial(prompt_stream, plan, run.data.url, data_cpus=1, wait_s=60, say=print),
        ptx=partial(ptx_stream, run, config, say=print),
    )
    ppo.fit()
    return comparable_metrics(ppo.run)


@pytest.mark.parametrize("pools", [SHARED, pytest.param(WIDE, marks=pytest.mark.slow)])
def test_pools_compute_what_one_process_does(
    base, saved, tmp_path, tiny_corpus, ray_session, pools
):
    """SHARED: two roles take turns on the same bundles, three leave the device while idle,
    optimizer state in host memory. WIDE: two workers in each pool, all but one partitioned."""
    one_line = pools.replace("\n", "")
    config = config_of(tmp_path / "pools", base, saved, tiny_corpus, one_line)
    run = train_ppo(config)
    metrics = comparable_metrics(run)
    expected = in_one_process(run, config_of(tmp_path / "one", base, saved, tiny_corpus))

    assert len(metrics) == len(expected) == ITERATIONS
    for line, other in zip(metrics, expected, strict=True):
        names = {name for name in line.keys() & other.keys() if not name.startswith("sync")}
        assert {"actor/loss", "actor/ptx_loss", "critic/loss", "rewards/score"} <= names
        for name in names:
            assert line[name] == pytest.approx(other[name], abs=1e-4, rel=1e-4), name
    assert run.finished
    assert committed(run.model) is not None
    text = run.model.read_text("README.md")
    assert "| talk | Apache-2.0 |" in text
    assert "| asked | Apache-2.0 |" in text
    assert run.manifest["ptx"]["num_samples"] > 100
    assert train_ppo(config).metrics() == run.metrics()  # finished: left as it is


def assert_refused(config: PPOStageConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train_ppo(config)
    run = Folder(config.run.dir)
    assert not (run / "data").names()
    assert not (run / "tokenizer").names()


@pytest.mark.usefixtures("ray_session")
def test_pools_that_leave_no_room_for_a_data_task_are_refused(base: Path, tmp_path: Path) -> None:
    """Four pools with one CPU each do not fit beside a data task on four CPUs."""
    config = ppo_config(tmp_path, base, *IN_ACTOR)
    pools = build_pools(config, 1, ConsoleReporter("ppo"))
    assert pools.data_cpus == config.cluster.data_cpus == 1
    assert ray.cluster_resources()["CPU"] == 4
    assert_refused(config, r"can never be placed: data tasks and pools before it use 4 CPU of 4")


@pytest.mark.usefixtures("ray_session")
def test_too_few_positions_are_refused_before_data_is_prepared(base: Path, tmp_path: Path) -> None:
    config = ppo_config(tmp_path, base, "rollout.max_new_tokens=500", *HALVES)
    assert_refused(
        config,
        r"data.max_length=32 and rollout.max_new_tokens=500 together .* positions of model.name=",
    )


def test_unreadable_judge_questions_are_refused_first(base: Path, tmp_path: Path) -> None:
    assert_refused(
        ppo_config(tmp_path, base, "judge.every=1", f'judge.key_points="{tmp_path}/none.jsonl"'),
        r"none\.jsonl",
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ("data.max_length=505",),
            r"data.max_length=505 .* exceed the 512 positions of model.name=",
        ),
        (
            ("judge.every=1", "judge.max_new_tokens=512"),
            r"judge.max_new_tokens=512 and the judge's longest",
        ),
        (("critic.model={short}",), r"the 36 positions of critic.model=.*short"),
        (
            ("reward.model={short}", "reward.score_weight=1.0"),
            r"the 36 positions of reward.model=.*short",
        ),
        (
            ("judge.every=1", "judge.max_new_tokens=8", "judge.model={short}"),
            r"the 36 positions of judge.model=.*short",
        ),
    ],
)
def test_every_model_needs_positions_for_the_longest_sequence(
    base: Path, short: Path, tmp_path: Path, overrides: tuple[str, ...], words: str
) -> None:
    check_models(ppo_config(tmp_path, base))
    with pytest.raises(ConfigError, match=words):
        check_models(ppo_config(tmp_path, base, *(o.format(short=short) for o in overrides)))

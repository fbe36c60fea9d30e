"""PPO from config to finished run on real pools: what one process would compute, on a real Ray."""

from functools import partial
from pathlib import Path

import pytest

from medgpt.config import PPOStageConfig
from medgpt.data.plan import Plan
from medgpt.rlhf.lessons import lesson_stream
from medgpt.rlhf.prompts import prompt_stream
from medgpt.rlhf.stage import run_ppo_stage
from medgpt.runs import Run, committed
from tests.rlhf.cases import ppo_config, save_reward_model
from tests.rlhf.inline import driver, numbers
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


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward_model(base, tmp_path_factory.mktemp("saved") / "reward")


def config_of(
    folder: Path, base: Path, saved: Path, corpus: Path, *overrides: str
) -> PPOStageConfig:
    """Two iterations with a reward model and with PPO-ptx."""
    folder.mkdir()
    talk = f"{{name='talk',paths=['{corpus}/sft'],licence='Apache-2.0'}}"
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
    """The metrics of roles in this process on the prompts and lessons of `run`."""
    plan = Plan(run.plan.url, global_batch_size=12, max_steps=ITERATIONS)
    ppo = driver(
        config,
        ITERATIONS,
        prompts=partial(prompt_stream, plan, run.data.url, data_cpus=1),
        lessons=partial(lesson_stream, run, config),
    )
    ppo.fit()
    return numbers(ppo.run)


@pytest.mark.parametrize("pools", [SHARED, pytest.param(WIDE, marks=pytest.mark.slow)])
def test_pools_compute_what_one_process_does(
    base, saved, tmp_path, tiny_corpus, ray_session, pools
):
    """SHARED: two roles in turns on the same bundles, three leave the device while they are idle,
    optimizer state in host memory. WIDE: two workers in each pool, all but one partitioned."""
    one_line = pools.replace("\n", "")
    config = config_of(tmp_path / "pools", base, saved, tiny_corpus, one_line)
    run = run_ppo_stage(config)
    found = numbers(run)
    expected = in_one_process(run, config_of(tmp_path / "one", base, saved, tiny_corpus))

    assert len(found) == len(expected) == ITERATIONS
    for line, other in zip(found, expected, strict=True):
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
    assert run_ppo_stage(config).metrics() == run.metrics()  # finished: left as it is

"""`medgpt plan`, from the command line: numbers of a 7B model, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from medgpt.cli import app
from tests.models.test_model_shapes import QWEN_7B
from tests.planning.clusters import write_cluster

ROOT = Path(__file__).parent.parent.parent
P = 7_615_616_512


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("large")
    (folder / "config.json").write_text(json.dumps(QWEN_7B), "utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_cluster(tmp_path_factory.mktemp("cluster")))


def plan(stage: str, cluster: str, *arguments: str) -> Any:
    """The result of the command."""
    config = str(ROOT / f"configs/{stage}.toml")
    return CliRunner().invoke(app, ["plan", stage, config, "--cluster", cluster, *arguments])


def planned(stage: str, cluster: str, *arguments: str) -> dict[str, Any]:
    result = plan(stage, cluster, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_fine_tuning_a_7b_model_takes_what_it_should(large: str, cluster: str) -> None:
    found = planned("sft", cluster, f"model.name={large}", "--tokens", "1e9")
    train = found["pools"]["train"]
    assert (train["workers"], train["parameters"], train["trained"]) == (8, P, P)
    assert train["held_gb"]["optimizer"] == pytest.approx(12 * P / 8 / 2**30)
    assert found["fits"]["train"]["rooms"]["train"]["fits"]
    assert found["nodes"] == {"head": 1, "train": 1, "data": 1}
    step = found["step"]
    products = P - QWEN_7B["vocab_size"] * 3584  # nearly
    flops = 4 * (2 * products + 4 * 28 * 3584 * 2048)  # with checkpointing
    assert step["tokens"] == 128 * 4096
    assert step["seconds"]["compute"] == pytest.approx(
        step["tokens"] * flops / (8 * 989.4e12 * 0.4), rel=0.01
    )
    assert step["at_peak_s"] == pytest.approx(0.4 * step["seconds"]["compute"])
    assert found["hours"] == pytest.approx(1e9 / step["tokens_per_s"] / 3600)
    assert found["cost"] == pytest.approx(found["hours"] * 21.5)


def test_every_engine_is_compared(large: str, cluster: str) -> None:
    variants = planned("sft", cluster, f"model.name={large}")["variants"]
    assert len(variants) == 14
    fits = {
        (v["zero_stage"], v["offload"], v["checkpointing"]): v["fits"]["train"] for v in variants
    }
    assert not fits[1, False, False]["rooms"]["train"]["fits"]
    assert fits[3, False, True]["rooms"]["train"]["fits"]
    assert fits[3, True, True]["device_gb"] < fits[3, False, True]["device_gb"]
    assert fits[3, True, True]["host_gb"] > fits[3, False, True]["host_gb"]


def test_ppo_is_planned_by_pool(large: str, cluster: str) -> None:
    overrides = (f"model.name={large}", "ppo.max_iterations=10")
    found = planned("ppo", cluster, *overrides)
    pools = found["pools"]
    assert set(pools) == {"actor", "critic", "reward", "reference", "rollout"}
    assert pools["rollout"]["held_gb"]["cache"] == pytest.approx(
        65536 * 28 * 2 * 4 * 128 * 2 / 2**30
    )
    assert pools["reward"]["parameters"] < pools["reference"]["parameters"] == P
    assert "optimizer" not in pools["reference"]["held_gb"]
    assert found["assumed"] == [
        "/shared/runs/reward-7b/model is not there yet; taken to be as large as model.name"
    ]
    seconds = found["step"]["seconds"]
    assert seconds["step"] == pytest.approx(sum(seconds.values()) - seconds["step"])
    assert found["tokens"] == 10 * found["step"]["tokens"]
    overlapped = planned("ppo", cluster, *overrides, "ppo.async_rollouts=true")
    assert overlapped["step"]["seconds"]["step"] < seconds["step"]


def test_roles_on_one_bundle_share_its_cpu(large: str, tmp_path: Path) -> None:
    resources = {"CPU": 64, "memory": 2000 * 2**30}
    file = str(write_cluster(tmp_path, available_node_types__data__resources=resources))
    alone = ["pools.reward={gpus_per_worker=0}", "pools.reference={gpus_per_worker=0}"]
    shared = [alone[0], 'pools.reference={gpus_per_worker=0,share_with="reward"}']
    apart, together = (
        planned("ppo", file, f"model.name={large}", *keys)["fits"] for keys in (alone, shared)
    )
    assert "reference" not in together
    both = apart["reward"]["device_gb"] + apart["reference"]["device_gb"]
    assert together["reward"]["device_gb"] == pytest.approx(both)


def test_without_a_price_there_is_no_cost_and_without_tokens_no_time(large, tmp_path) -> None:
    file = str(write_cluster(tmp_path, metadata={}))
    found = planned("sft", file, f"model.name={large}")
    assert found["price_per_hour"] is found["cost"] is found["hours"] is None


def test_the_console_tells_it_in_tables(large: str, cluster: str) -> None:
    result = plan("sft", cluster, f"model.name={large}", "--tokens", "1e9")
    assert result.exit_code == 0
    assert "the autoscaler starts 1 x head (CPU)" in result.output
    assert "an assumed 40% of the peak" in result.output
    assert "hours, " in result.output


# ---- what is refused ----


def refusal(stage: str, cluster: str, *arguments: str) -> str:
    result = plan(stage, cluster, *arguments)
    assert result.exit_code == 2
    return result.stderr


def test_a_model_that_fits_nowhere_is_refused_with_the_smallest_change(large, cluster) -> None:
    alone = (f"model.name={large}", "cluster.num_workers=1", "engine.zero_stage=1")
    text = refusal("sft", cluster, *alone)
    assert "a worker of train needs " in text
    assert "no node type has so much within 90% of its memory: train has 79 GiB" in text
    assert "it would fit with engine.offload_optimizer=true (" in text
    assert planned("sft", cluster, *alone, "engine.offload_optimizer=true")


def test_more_workers_are_a_change_too(large: str, cluster: str) -> None:
    keys = (f"model.name={large}", "cluster.num_workers=2", "train.micro_batch_size=1")
    text = refusal("sft", cluster, *keys, "engine.offload_optimizer=false")
    assert "it would fit with " in text


def test_what_no_change_makes_fit_is_refused_plainly(large: str, tmp_path: Path) -> None:
    file = write_cluster(tmp_path)
    file.with_suffix(".toml").write_text(
        """
[nodes.train]
device = "Tiny"
[devices.Tiny]
memory_gb = 2
tflops = 1
memory_gb_per_s = 1
link_gb_per_s = 1
source = "made up"
""",
        "utf-8",
    )
    text = refusal("sft", str(file), f"model.name={large}")
    assert "no change of its engine, micro-batches or workers makes it fit" in text


def test_stages_without_a_model_to_train_are_not_planned(cluster: str) -> None:
    result = CliRunner().invoke(app, ["plan", "corpus", "x.toml", "--cluster", cluster])
    assert result.exit_code == 2
    assert (
        "STAGE=corpus is none that can be planned: pretrain, sft, reward, dpo, ppo" in result.stderr
    )


def test_a_base_model_that_is_still_to_be_trained_asks_for_another_of_its_size(cluster) -> None:
    assert "/shared/runs/pretrain-7b/model: no such folder; name a model" in refusal("sft", cluster)


def test_times_are_finite(large: str, cluster: str) -> None:
    for stage in ("sft", "reward", "dpo"):
        found = planned(stage, cluster, f"model.name={large}", "cluster.num_workers=8")
        assert math.isfinite(found["step"]["tokens_per_s"])

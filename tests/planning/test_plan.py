"""`medgpt plan` from the command line: numbers for a 7B model, and errors."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from medgpt.cli import app
from tests.models.test_model_shapes import QWEN_7B
from tests.planning.cluster_files import write_cluster_file

ROOT = Path(__file__).parent.parent.parent
P = 7_615_616_512


@pytest.fixture(scope="module")
def model_7b(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("large")
    (folder / "config.json").write_text(json.dumps(QWEN_7B), "utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_cluster_file(tmp_path_factory.mktemp("cluster")))


def plan(stage: str, cluster: str, *arguments: str) -> Any:
    """Run the command and return its result."""
    config = str(ROOT / f"configs/{stage}.toml")
    return CliRunner().invoke(app, ["plan", stage, config, "--cluster", cluster, *arguments])


def planned(stage: str, cluster: str, *arguments: str) -> dict[str, Any]:
    result = plan(stage, cluster, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_plan_of_7b_fine_tuning_matches_hand_computed_numbers(
    model_7b: str, cluster: str
) -> None:
    planned_json = planned("sft", cluster, f"model.name={model_7b}", "--tokens", "1e9")
    train = planned_json["pools"]["train"]
    assert (train["workers"], train["parameters"], train["trained"]) == (8, P, P)
    assert train["held_gb"]["optimizer"] == pytest.approx(12 * P / 8 / 2**30)
    assert planned_json["fits"]["train"]["rooms"]["train"]["fits"]
    assert planned_json["nodes"] == {"head": 1, "train": 1, "data": 1}
    step = planned_json["step"]
    products = P - QWEN_7B["vocab_size"] * 3584  # nearly
    flops = 4 * (2 * products + 4 * 28 * 3584 * 2048)  # with checkpointing
    assert step["tokens"] == 128 * 4096
    assert step["seconds"]["compute"] == pytest.approx(
        step["tokens"] * flops / (8 * 989.4e12 * 0.4), rel=0.01
    )
    assert step["at_peak_s"] == pytest.approx(0.4 * step["seconds"]["compute"])
    assert planned_json["hours"] == pytest.approx(1e9 / step["tokens_per_s"] / 3600)
    assert planned_json["cost"] == pytest.approx(planned_json["hours"] * 21.5)


def test_every_engine_is_compared(model_7b: str, cluster: str) -> None:
    variants = planned("sft", cluster, f"model.name={model_7b}")["variants"]
    assert len(variants) == 14
    fits = {
        (v["zero_stage"], v["offload"], v["checkpointing"]): v["fits"]["train"] for v in variants
    }
    assert not fits[1, False, False]["rooms"]["train"]["fits"]
    assert fits[3, False, True]["rooms"]["train"]["fits"]
    assert fits[3, True, True]["device_gb"] < fits[3, False, True]["device_gb"]
    assert fits[3, True, True]["host_gb"] > fits[3, False, True]["host_gb"]


def test_ppo_is_planned_by_pool(model_7b: str, cluster: str) -> None:
    overrides = (f"model.name={model_7b}", "ppo.max_iterations=10")
    planned_json = planned("ppo", cluster, *overrides)
    pools = planned_json["pools"]
    assert set(pools) == {"actor", "critic", "reward", "reference", "rollout"}
    assert pools["rollout"]["held_gb"]["cache"] == pytest.approx(
        65536 * 28 * 2 * 4 * 128 * 2 / 2**30
    )
    assert pools["reward"]["parameters"] < pools["reference"]["parameters"] == P
    assert "optimizer" not in pools["reference"]["held_gb"]
    assert planned_json["assumed"] == [
        "/shared/runs/reward-7b/model is not there yet; taken to be as large as model.name"
    ]
    seconds = planned_json["step"]["seconds"]
    assert seconds["step"] == pytest.approx(sum(seconds.values()) - seconds["step"])
    assert planned_json["tokens"] == 10 * planned_json["step"]["tokens"]
    overlapped = planned("ppo", cluster, *overrides, "ppo.async_rollouts=true")
    assert overlapped["step"]["seconds"]["step"] < seconds["step"]


def test_roles_on_one_bundle_share_its_cpu(model_7b: str, tmp_path: Path) -> None:
    resources = {"CPU": 64, "memory": 2000 * 2**30}
    file = str(write_cluster_file(tmp_path, available_node_types__data__resources=resources))
    alone = ["pools.reward={gpus_per_worker=0}", "pools.reference={gpus_per_worker=0}"]
    shared = [alone[0], 'pools.reference={gpus_per_worker=0,share_with="reward"}']
    apart, together = (
        planned("ppo", file, f"model.name={model_7b}", *keys)["fits"] for keys in (alone, shared)
    )
    assert "reference" not in together
    both = apart["reward"]["device_gb"] + apart["reference"]["device_gb"]
    assert together["reward"]["device_gb"] == pytest.approx(both)


def test_without_a_price_there_is_no_cost_and_without_tokens_no_time(model_7b, tmp_path) -> None:
    file = str(write_cluster_file(tmp_path, metadata={}))
    planned_json = planned("sft", file, f"model.name={model_7b}")
    assert planned_json["price_per_hour"] is planned_json["cost"] is planned_json["hours"] is None


def test_a_plan_is_printed_as_tables(model_7b: str, cluster: str) -> None:
    result = plan("sft", cluster, f"model.name={model_7b}", "--tokens", "1e9")
    assert result.exit_code == 0
    assert "the autoscaler starts 1 x head (CPU)" in result.output
    assert "an assumed 40% of the peak" in result.output
    assert "hours, " in result.output


# ---- what is refused ----


def refusal(stage: str, cluster: str, *arguments: str) -> str:
    result = plan(stage, cluster, *arguments)
    assert result.exit_code == 2
    return result.stderr


def test_a_model_that_fits_nowhere_is_refused_with_the_smallest_change(model_7b, cluster) -> None:
    alone = (f"model.name={model_7b}", "cluster.num_workers=1", "engine.zero_stage=1")
    text = refusal("sft", cluster, *alone)
    assert "a worker of train needs " in text
    assert "more than 90% of the memory of every node type: train has 79 GiB" in text
    assert "it would fit with engine.offload_optimizer=true (" in text
    assert planned("sft", cluster, *alone, "engine.offload_optimizer=true")


def test_more_workers_can_be_the_suggested_change(model_7b: str, cluster: str) -> None:
    keys = (f"model.name={model_7b}", "cluster.num_workers=2", "train.micro_batch_size=1")
    text = refusal("sft", cluster, *keys, "engine.offload_optimizer=false")
    assert "it would fit with " in text


def test_a_model_that_no_change_makes_fit_is_refused(model_7b: str, tmp_path: Path) -> None:
    file = write_cluster_file(tmp_path)
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
    text = refusal("sft", str(file), f"model.name={model_7b}")
    assert "no change of its engine, micro-batches or workers makes it fit" in text


def test_stages_without_a_model_to_train_are_not_planned(cluster: str) -> None:
    result = CliRunner().invoke(app, ["plan", "corpus", "x.toml", "--cluster", cluster])
    assert result.exit_code == 2
    assert (
        "STAGE=corpus cannot be planned; choose one of pretrain, sft, reward, dpo, ppo"
        in result.stderr
    )


def test_a_missing_base_model_is_an_error_with_a_remedy(cluster) -> None:
    assert "/shared/runs/pretrain-7b/model: no such folder; name an available model" in refusal(
        "sft", cluster
    )


def test_times_are_finite(model_7b: str, cluster: str) -> None:
    for stage in ("sft", "reward", "dpo"):
        planned_json = planned(stage, cluster, f"model.name={model_7b}", "cluster.num_workers=8")
        assert math.isfinite(planned_json["step"]["tokens_per_s"])

"""Stages as jobs on a cluster: submitted, followed, killed, resumed, without leaking data."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import requests
import tomli_w
from transformers import AutoModelForCausalLM

from medgpt.config.stages import TrainStageConfig
from medgpt.runs import Run
from tests.jobs.ray_cluster import RayCluster, running_cluster
from tests.train.test_resume import train_losses
from tests.train.tiny_configs import pretrain_config, source_settings, write_toml
from tests.train.worker_hooks import last_logged_step

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
SECRET = "planted-secret-7f3a9c"
PATIENT = {"name": "欧阳慕寒", "id": "11010119870307561X", "phone": "13912345678"}
TWO_NODES_OF_FOUR_GPUS = """
import sys
from ray._raylet import (
    GCS_AUTOSCALER_CLUSTER_CONFIG_KEY, GCS_AUTOSCALER_STATE_NAMESPACE, GcsClient
)
from ray.core.generated.autoscaler_pb2 import ClusterConfig

limits = ClusterConfig()
limits.node_group_configs.add(name="gpu", resources={"CPU": 8, "GPU": 4}, max_count=2)
GcsClient(address=sys.argv[1]).internal_kv_put(
    GCS_AUTOSCALER_CLUSTER_CONFIG_KEY.encode(), limits.SerializeToString(), True,
    GCS_AUTOSCALER_STATE_NAMESPACE.encode(),
)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with running_cluster(MEDGPT_TEST_SECRET=SECRET) as cluster:
        yield cluster


def files_containing(paths: Iterable[Path], *words: str) -> list[str]:
    """Return the files below `paths` that contain one of the words."""
    files = [file for path in paths for file in [path, *path.rglob("*")] if file.is_file()]
    assert files
    return [str(file) for file in files if any(w.encode() in file.read_bytes() for w in words)]


def job_infos(cluster: RayCluster) -> str:
    """Return the text of the dashboard's job list."""
    token = {"Authorization": f"Bearer {cluster.environment['RAY_AUTH_TOKEN']}"}
    answer = requests.get(f"{cluster.address}/api/jobs/", headers=token)
    answer.raise_for_status()
    return answer.text


def write_stage_config(folder: Path, config: TrainStageConfig) -> tuple[Path, str]:
    """Write the config to an empty folder; return the folder and the file name."""
    folder.mkdir()
    return folder, write_toml(config, folder / "stage.toml").name


def test_a_submitted_stage_is_followed_and_known_by_its_run(
    cluster: RayCluster, tmp_path: Path
) -> None:
    (tmp_path / "corpus.toml").write_text("shards = 1")
    run, here = tmp_path / "runs/corpus", {"folder": tmp_path, "MEDGPT_TEST_SECRET": SECRET}
    submit = ("submit", "corpus", "corpus.toml", f"run.dir={run}")
    secret = ("--secret-env", "MEDGPT_TEST_SECRET")

    relative = cluster.medgpt(*submit[:-1], "run.dir=runs/corpus", folder=tmp_path)
    assert relative.returncode == 2
    assert "run.dir='runs/corpus': a submitted job needs an absolute path" in relative.stderr

    refused = cluster.medgpt(*submit[:-1], f"run.dir={tmp_path}/{SECRET}", *secret, **here)
    assert refused.returncode == 2
    assert "the value of MEDGPT_TEST_SECRET is in the config" in refused.stderr
    assert SECRET not in refused.stdout + refused.stderr

    first = cluster.medgpt(*submit, *secret, **here)
    assert first.returncode == 0, first.stdout + first.stderr
    name = first.stdout.split()[1].rstrip(":")
    assert f"submitted {name}: begins {run}" in first.stdout
    assert "Running entrypoint" in first.stdout
    assert f"{name}  SUCCEEDED" in first.stdout
    assert Run(str(run)).finished

    again = cluster.medgpt(*submit, **here)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"submitted {name[:-1]}2: resumes {run}" in again.stdout
    listed = cluster.medgpt("job", "status").stdout.splitlines()
    assert [line.split()[:2] for line in listed[-2:]] == [
        [name, "SUCCEEDED"],
        [f"{name[:-1]}2", "SUCCEEDED"],
    ]
    assert cluster.medgpt("job", "status", str(run)).stdout.startswith(f"{name[:-1]}2  SUCCEEDED")
    assert "Running entrypoint" in cluster.medgpt("job", "logs", name).stdout
    unknown = cluster.medgpt("job", "logs", "nothing")
    assert unknown.returncode == 2
    assert f"no job has this id or run directory; jobs: {name}, " in unknown.stderr

    assert SECRET not in first.stdout + first.stderr + job_infos(cluster)
    assert "MEDGPT_TEST_SECRET" in job_infos(cluster)
    assert files_containing([run, cluster.folder], SECRET) == []


def test_a_wrong_config_or_a_missing_secret_ends_a_job_at_once_with_its_reason(
    cluster: RayCluster, tmp_path: Path
) -> None:
    (tmp_path / "corpus.toml").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    submit = ("submit", "corpus", "corpus.toml")
    ended = cluster.medgpt(*submit, f"run.dir={tmp_path}/full", folder=tmp_path)
    assert ended.returncode == 2
    assert "holds mine.txt but no config.toml" in ended.stdout
    assert "restart" not in ended.stdout
    ended = cluster.medgpt(
        *submit, f"run.dir={tmp_path}/run", "--secret-env", "NOT_THERE", folder=tmp_path
    )
    assert ended.returncode == 2
    assert "--secret-env NOT_THERE is not in the environment of Ray on" in ended.stdout
    assert not (tmp_path / "run").exists()


def test_submission_without_the_token_of_the_cluster_is_refused(
    cluster: RayCluster, tmp_path: Path
) -> None:
    refused = cluster.medgpt("job", "status", RAY_AUTH_TOKEN="0" * 64)
    assert refused.returncode == 2
    assert "RAY_AUTH_TOKEN" in refused.stderr
    nobody = subprocess.run(
        [*cluster.command("job", "status")[:-1], "http://127.0.0.1:1"],
        env=cluster.environment,
        capture_output=True,
        text=True,
    )
    assert nobody.returncode == 2
    assert "http://127.0.0.1:1: no Ray dashboard answers" in nobody.stderr


@pytest.mark.slow
def test_plain_ray_job_submit_leaves_its_run_in_the_absolute_run_directory(
    cluster: RayCluster, base: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    job = cluster.ray_submit(
        *["medgpt", "sft", "configs/debug/sft.toml", f"run.dir={tmp_path}/run"],
        *[f"model.name={base}", f'data.sources.0.paths=["{tiny_corpus}/sft"]'],
        *["train.max_steps=3", "train.epochs=1", "report.prompts=[]"],
    )
    assert job.returncode == 0, job.stdout + job.stderr
    assert "succeeded" in job.stdout
    run = Run(f"{tmp_path}/run")
    assert run.finished
    assert run.metrics()[-1]["step"] == 3
    AutoModelForCausalLM.from_pretrained(run.model.url)


@pytest.mark.slow
def test_plain_ray_job_submit_refuses_a_relative_run_directory(cluster: RayCluster) -> None:
    job = cluster.ray_submit("medgpt", "sft", "configs/debug/sft.toml", "train.max_steps=3")
    assert job.returncode != 0
    assert (
        "run.dir='runs/debug/sft': a submitted job needs an absolute path or URI, its working "
        "directory is a cached copy" in job.stdout
    )


class Submitted:
    """`medgpt submit pretrain` of a run that is long enough to be interrupted."""

    def __init__(self, cluster: RayCluster, corpus: Path, folder: Path) -> None:
        self.cluster, self.run = cluster, Run(f"{folder}/run")
        train = {"epochs": 6, "checkpoint_every": 5, "eval_every": 1000}
        config = pretrain_config(folder / "run", corpus, train=train)
        self.folder, self.config = write_stage_config(folder / "typed", config)

    def start(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            self.cluster.command("submit", "pretrain", self.config),
            cwd=self.folder,
            env=self.cluster.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 300
        while last_logged_step(Path(self.run.folder.path("metrics.jsonl"))) < step:
            assert time.monotonic() < deadline, f"no step {step}"
            time.sleep(0.1)

    def finish(self, job: "subprocess.Popen[str]") -> str:
        said, _ = job.communicate(timeout=400)
        assert job.returncode == 0, said
        assert self.run.finished
        return said


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_driver_and_a_stopped_job_end_with_the_metrics_of_an_undisturbed_run(
    cluster: RayCluster, tiny_corpus: Path, tmp_path: Path
) -> None:
    for name in ("quiet", "disturbed"):
        (tmp_path / name).mkdir()
    quiet = Submitted(cluster, tiny_corpus, tmp_path / "quiet")
    quiet.finish(quiet.start())

    disturbed = Submitted(cluster, tiny_corpus, tmp_path / "disturbed")
    job = disturbed.start()
    disturbed.wait_for_step(12)
    refused = cluster.medgpt("submit", "pretrain", disturbed.config, folder=disturbed.folder)
    assert refused.returncode == 2
    assert f"run.dir={disturbed.run.folder.url} is in use by job" in refused.stderr
    drivers = [
        process
        for process in cluster.processes("-m", "medgpt", "pretrain")
        if "medgpt.jobs.supervise" not in process.cmdline()
    ]
    drivers[-1].send_signal(signal.SIGKILL)
    disturbed.wait_for_step(40)
    assert disturbed.run.manifest["attempt"] == 2

    stopped = cluster.medgpt("job", "stop", disturbed.run.folder.url)
    assert "STOPPED" in stopped.stdout, stopped.stderr
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "signal 9 killed the command; restart 1 of 5" in said
    assert not disturbed.run.finished

    disturbed.finish(disturbed.start())
    assert disturbed.run.manifest["attempt"] == 3
    assert train_losses(disturbed.run) == pytest.approx(train_losses(quiet.run), abs=1e-6)


@pytest.mark.slow
def test_a_pipeline_is_one_job_that_resumes_at_the_failed_stage(
    cluster: RayCluster, tmp_path: Path
) -> None:
    (tmp_path / "corpus.toml").write_text("")
    corpus = {"stage": "corpus", "config": "corpus.toml"}
    stages = [
        {**corpus, "overrides": ["run.dir={dir}/a"]},
        {**corpus, "overrides": [f"run.dir={tmp_path}/b", "shards=2"]},
    ]
    tree = {"run": {"dir": f"{tmp_path}/runs"}, "stages": stages}
    (tmp_path / "pipeline.toml").write_text(tomli_w.dumps(tree))
    (tmp_path / "b").mkdir()
    (tmp_path / "b/mine.txt").write_text("mine")
    submit = ("submit", "pipeline", "pipeline.toml")
    failed = cluster.medgpt(*submit, folder=tmp_path)
    assert failed.returncode == 2
    assert "b holds mine.txt" in failed.stdout
    (tmp_path / "b/mine.txt").unlink()
    (tmp_path / "another.py").write_text("# so that the copy lies elsewhere")
    before = (tmp_path / "runs/a/manifest.json").read_text()
    done = cluster.medgpt(*submit, folder=tmp_path)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "runs/a/manifest.json").read_text() == before
    assert Run(f"{tmp_path}/runs").finished


def test_a_pool_that_no_node_can_hold_is_refused_at_submission(
    base: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    config = {
        "run": {"dir": f"{tmp_path}/run"},
        "model": {"name": str(base)},
        "data": {"sources": [source_settings("sft", tiny_corpus / "sft")]},
        "reward": {"score_weight": 0},
        "pools": {"rollout": {"gpus_per_worker": 8}},
    }
    (tmp_path / "ppo.toml").write_text(tomli_w.dumps(config))
    with running_cluster(num_cpus=1) as cluster:
        tell = [sys.executable, "-c", TWO_NODES_OF_FOUR_GPUS, f"127.0.0.1:{cluster.ports['port']}"]
        subprocess.run(tell, env=cluster.environment, check=True)
        refused = cluster.medgpt("submit", "ppo", "ppo.toml", "--detach", folder=tmp_path)
        assert refused.returncode == 2, refused.stdout
        assert (
            "pools.rollout (1 x (1 CPU, 8 GPU)) can never be placed: no node can hold one; the "
            "cluster has 1 x (1 CPU), its autoscaler may run up to 2 x (8 CPU, 4 GPU)"
        ) in refused.stderr
        assert not (tmp_path / "run").exists()
        assert json.loads(job_infos(cluster)) == []


@pytest.mark.slow
def test_patient_texts_are_in_no_log_metric_report_or_job_metadata(
    cluster: RayCluster, base: Path, tmp_path: Path
) -> None:
    question = f"患者{PATIENT['name']},身份证{PATIENT['id']},电话{PATIENT['phone']},头痛三天怎么办?"
    answer = f"{PATIENT['name']}您好,请先测量血压。"
    good = {"messages": [_message("user", question), _message("assistant", answer)]}
    bad = [{"messages": [_message("assistant", question)]}, {"messages": question}]
    lines = [json.dumps(row, ensure_ascii=False) for row in [good] * 200 + bad]
    (tmp_path / "patients.jsonl").write_text("\n".join([*lines, '{"broken": "' + question]))
    patients = source_settings("patients", tmp_path / "patients.jsonl") | {"sensitive": True}
    for name, share in (("trained", 0.1), ("refused", 0.0)):
        tree = {
            "run": {"dir": f"{tmp_path}/{name}"},
            "model": {"name": str(base)},
            "data": {"sources": [patients], "max_malformed_share": share, "max_length": 256},
            "train": {"max_steps": 4, "global_batch_size": 8, "audit": True, "log_every": 1},
            "cluster": {"num_workers": 2},
        }
        (tmp_path / f"{name}.toml").write_text(tomli_w.dumps(tree))
    job = cluster.medgpt("submit", "sft", "trained.toml", folder=tmp_path)
    assert job.returncode == 0, job.stdout
    refused = cluster.medgpt("submit", "sft", "refused.toml", folder=tmp_path)
    assert "3 of 203 rows are malformed" in refused.stdout

    kept = {"data", "plan", "checkpoints"}  # what training is made of
    written = [path for path in (tmp_path / "trained").iterdir() if path.name not in kept]
    assert {"metrics.jsonl", "report.html", "rejected", "manifest.json"} <= {
        path.name for path in written
    }
    assert files_containing([tmp_path / "patients.jsonl"], PATIENT["id"])
    logs = [*cluster.folder.glob("session_*/logs")]
    assert (
        files_containing([*written, *logs, tmp_path / "refused/rejected"], *PATIENT.values()) == []
    )
    said = job.stdout + job.stderr + refused.stdout + job_infos(cluster)
    assert not [word for word in PATIENT.values() if word in said or _escaped(word) in said]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _escaped(text: str) -> str:
    return json.dumps(text)[1:-1]

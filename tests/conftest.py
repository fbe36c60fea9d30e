"""What the tests share: one thread per process, a small corpus, one local Ray for the session."""

import os
import sys

# before torch is imported, here and in every process that starts from here
os.environ["OMP_NUM_THREADS"] = "1"

import json
import logging
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from medgpt.sample_corpus.generator import CorpusGenerator

if TYPE_CHECKING:
    from medgpt.runs import Run

ROOT = Path(__file__).parent.parent
OWN_CLUSTERS = {  # files whose tests on Ray start clusters of their own
    "clusters/test_local.py",
    "clusters/test_spot_notice.py",
    "clusters/test_tune.py",
    "jobs/test_submit.py",
    "rlhf/test_ppo_autoscaling.py",
    "rlhf/test_ppo_deaths.py",
    "rlhf/test_ppo_nodes.py",
    "train/test_chaos.py",
    "train/test_elastic.py",
}
TAKE_SECONDS = {  # files that `tests/run.sh --quick` leaves out
    "clusters/test_kuberay.py",
    "engine/test_checkpoint.py",
    "engine/test_moe.py",
    "engine/test_value.py",
    "jobs/test_supervise.py",
    "models/test_attention.py",
    "models/test_families.py",
    "models/test_inference_check.py",
    "models/test_layout.py",
    "models/test_matrix.py",
    "models/test_model_shapes.py",
    "models/test_moe_lora.py",
    "models/test_quantize.py",
    "planning/test_measured_memory.py",
    "rlhf/test_ppo_learning.py",
    "stages/test_chat.py",
    "test_no_foreign_code.py",
    "train/test_dpo_losses.py",
    "train/test_lm_objective.py",
    "train/test_lost_store.py",
    "train/test_reward_objective.py",
}
SHELF = ROOT / "tests" / "shelf"
SHARED_DATA = Path(os.environ.get("MEDGPT_SHARED_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """URI of an empty bucket on an S3 server of this process, which children know as well."""
    import fsspec
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ.update(
        AWS_ENDPOINT_URL=f"http://{host}:{port}",
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY="test",
        AWS_DEFAULT_REGION="us-east-1",
    )
    fsspec.filesystem("s3").mkdir("medgpt")
    yield "s3://medgpt"
    server.stop()


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of a store whose protocol fsspec knows by an entry point, and pyarrow does not.

    Its objects are files of a local folder; processes that start from here know it as well.
    """
    from fsspec import process_entries

    os.environ["SHELF_FOLDER"] = str(tmp_path_factory.mktemp("shelf"))
    os.environ["PYTHONPATH"] = f"{SHELF}:{os.environ.get('PYTHONPATH', '')}"
    sys.path.append(str(SHELF))
    process_entries()
    return "shelf://medgpt"


@pytest.fixture(scope="session")
def ray_session(s3: str, shelf: str) -> Iterator[None]:
    """A local Ray of four logical CPUs on any machine; a worker or a data task takes one."""
    import ray

    from medgpt.cluster import ray_init

    ray_init.start_local(4, loopback=False)  # some tests start commands that join it
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def _ray_survives() -> Iterator[None]:
    """Fail the test that shuts down a Ray of other tests; later ones would start another one."""
    ray = sys.modules.get("ray")  # importing it takes seconds
    if ray is None or not ray.is_initialized():
        yield
    else:
        yield
        assert ray.is_initialized(), "this test shut down the Ray of the session"


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    """`two_ranks(function, *args)` runs a module-level function on both ranks; their results."""
    from tests.engine.ranks import start_ranks

    with start_ranks(tmp_path_factory.mktemp("ranks") / "store") as run:
        yield run


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pretrain/*.jsonl with 300 documents and sft/*.jsonl with 150 dialogues, two shards each."""
    corpus = CorpusGenerator()
    folder = tmp_path_factory.mktemp("corpus")
    for kind, rows in (("pretrain", corpus.documents()), ("sft", corpus.dialogues())):
        chosen = list(islice(rows, 0, 1500, 5 if kind == "pretrain" else 10))
        for shard in range(2):
            path = folder / kind / f"{shard}.jsonl"
            path.parent.mkdir(exist_ok=True)
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in chosen[shard::2]]
            path.write_text("".join(lines), "utf-8")
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with fresh weights and a tokenizer that spells everything in bytes."""
    from tests.models.tiny_models import save_model_with_tokenizer

    texts = ["高血压是常见的慢性病。", "什么是高血压?血压持续升高。"] * 50
    folder = tmp_path_factory.mktemp("base")
    save_model_with_tokenizer(folder, texts, vocab_size=800, max_positions=512)
    return folder


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`family_folder(name)` is the saved model of a family, see tests/models/families.py."""
    from tests.models.families import FAMILIES

    saved: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in saved:
            saved[name] = FAMILIES[name].save(tmp_path_factory.mktemp(name) / name)
        return saved[name]

    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data folder; the test is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no {SHARED_DATA}; set MEDGPT_SHARED_DATA to the real data folder")
    return SHARED_DATA


@pytest.fixture(scope="session")
def pretrained(
    ray_session: None, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> "Run":
    """A run of two workers, ZeRO-2, with audit, never interrupted."""
    from medgpt.stages.train import run_pretrain
    from tests.train.tiny_configs import pretrain_config

    return run_pretrain(pretrain_config(tmp_path_factory.mktemp("runs") / "pretrain", tiny_corpus))


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests with clusters of their own and long ones."""
    for item in items:
        file = item.path.relative_to(ROOT / "tests").as_posix()
        if file in OWN_CLUSTERS and item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.own_clusters)
        if file in TAKE_SECONDS:
            item.add_marker(pytest.mark.seconds)

"""The pinned packages of CPU and GPU machines."""

import re

from tests.clusters.definitions import CLUSTERS, ROOT

JOBS = ROOT / "jobs"


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (JOBS / name).read_text("utf-8").splitlines() if line]
    lines = [line for line in lines if not line.startswith(("#", "-c"))]
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines)  # none twice, all exact
    return pins


def test_the_gpu_set_is_the_cpu_set_and_torchs_libraries() -> None:
    text = (JOBS / "constraints-cuda.txt").read_text("utf-8")
    assert re.findall(r"^-c (.+)$", text, re.MULTILINE) == ["constraints.txt"]
    cpu, cuda = pins("constraints.txt"), pins("constraints-cuda.txt")
    assert not cpu.keys() & cuda.keys()
    assert cpu["torch"] == "2.13.0"
    assert {"nvidia-nccl-cu13", "nvidia-cudnn-cu13", "triton"} <= cuda.keys()


def test_gpu_machines_install_the_gpu_set() -> None:
    assert "-c jobs/constraints-cuda.txt" in (CLUSTERS / "setup.sh").read_text("utf-8")
    dockerfile = (CLUSTERS / "kuberay" / "Dockerfile").read_text("utf-8")
    assert "gpu) pins=constraints-cuda.txt ;; *) pins=constraints.txt" in dockerfile
    toolkit = re.search(r"nvidia/cuda:(\d+\.\d+)\.", dockerfile)
    assert toolkit is not None
    assert pins("constraints-cuda.txt")["cuda-toolkit"].startswith(f"{toolkit[1]}.")

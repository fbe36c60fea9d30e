"""Ray gets a file system where pyarrow knows none."""

import pickle
from pathlib import Path

from medgpt.artifacts import Folder
from medgpt.cluster.ray_storage import storage_settings


def test_a_local_folder_needs_no_file_system(tmp_path: Path) -> None:
    for url in (f"{tmp_path}/run/ray", f"file://{tmp_path}/run/ray", f"local://{tmp_path}/run/ray"):
        settings = storage_settings(Folder(url))
        assert settings == {
            "name": "ray",
            "storage_path": f"{tmp_path}/run",
            "storage_filesystem": None,
        }


def test_a_protocol_that_pyarrow_does_not_know_reaches_ray_and_its_workers(shelf: str) -> None:
    folder = Folder(f"{shelf}/run/ray")
    settings = pickle.loads(pickle.dumps(storage_settings(folder)))
    assert (settings["name"], settings["storage_path"]) == ("ray", "medgpt/run")
    with settings["storage_filesystem"].open_output_stream("medgpt/run/ray/record") as file:
        file.write(b"x")
    assert folder.read_text("record") == "x"

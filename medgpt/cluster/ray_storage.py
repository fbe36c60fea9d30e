"""Where Ray Train and Ray Tune keep their own record of a run."""

from typing import Any

from pyarrow.fs import FSSpecHandler, PyFileSystem

from medgpt.artifacts import Folder


def storage_settings(folder: Folder) -> dict[str, Any]:
    """Return the arguments of Ray's RunConfig that make it keep its record in `folder`.

    Ray alone finds a file system by the URI, and pyarrow knows fewer protocols than fsspec.
    """
    parent, _, name = folder.root.rpartition("/")
    filesystem = None if folder.is_local else PyFileSystem(FSSpecHandler(folder.fs))
    return {"name": name, "storage_path": parent, "storage_filesystem": filesystem}

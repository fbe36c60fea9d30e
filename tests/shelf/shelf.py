"""A store of its own protocol over a local folder, registered as packages for oss:// are."""

import os
from typing import Any

from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem


class ShelfFileSystem(DirFileSystem):
    protocol = "shelf"

    def __init__(self, **options: Any) -> None:
        folder = os.environ["SHELF_FOLDER"]
        super().__init__(path=folder, fs=LocalFileSystem(auto_mkdir=True), **options)

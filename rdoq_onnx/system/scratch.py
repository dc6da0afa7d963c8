"""The folder for what does not fit in memory: large weights, statistics and codes, an array a file.

Without a checkpoint it is a temporary folder, removed with the last object that uses it. Beside a checkpoint FILE it is
FILE.data, and stays: a later run goes on from there.
"""

import contextlib
import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.errors import OutputError
from rdoq_onnx.model.external import Shelf
from rdoq_onnx.system.atomic import reason

Array = NDArray[Any]
_SUFFIX = ".data"
_PREFIX = "rdoq-onnx-"


@dataclass(frozen=True, eq=False)
class Scratch:
    """Arrays by name in a folder that is made when the first one arrives.

    parent: where to make a temporary folder; None for the system's. checkpoint: the file that the folder belongs to,
    if any.
    """

    parent: Path | None = None
    checkpoint: Path | None = None

    @cached_property
    def folder(self) -> Path:
        """The folder, made if need be. Raises OutputError."""
        try:
            if self.checkpoint is not None:
                path = self.checkpoint.with_name(self.checkpoint.name + _SUFFIX).absolute()
                path.mkdir(exist_ok=True)
                return path
            made = tempfile.mkdtemp(prefix=_PREFIX, dir=self.parent)
        except OSError as error:
            where = self.parent or self.checkpoint or tempfile.gettempdir()
            raise OutputError(f"{where}: no scratch folder can be made ({reason(error)}); give --scratch") from error
        weakref.finalize(self, shutil.rmtree, made, ignore_errors=True)
        return Path(made).absolute()

    @cached_property
    def shelf(self) -> Shelf:
        """The file for large weights of models in memory."""
        return Shelf(lambda: self.folder / "weights")

    def free(self) -> tuple[int, str]:
        """Return the bytes that are free where the folder is or would be, and that place."""
        where = self.checkpoint.absolute().parent if self.checkpoint is not None else self.parent
        place = os.fspath(where or tempfile.gettempdir())
        return shutil.disk_usage(place).free, place

    def bind(self, identity: str) -> None:
        """Empty the folder of a checkpoint unless it was written under the same `identity`."""
        if self.checkpoint is None or not self.checkpoint.with_name(self.checkpoint.name + _SUFFIX).exists():
            return
        mark = self.folder / "identity"
        with contextlib.suppress(OSError):
            if mark.read_text() == identity:
                return
        for path in self.folder.glob("*.npy"):
            path.unlink(missing_ok=True)
        mark.write_text(identity)

    def put(self, name: str, array: Array) -> None:
        """Keep `array`; a killed run leaves none of it or all. Raises OutputError."""
        path = self._path(name)
        part = path.with_suffix(".part")
        try:
            with part.open("wb") as file:
                np.save(file, array, allow_pickle=False)
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise OutputError(f"{path}: cannot be written ({reason(error)}); give --scratch a larger folder") from error

    def get(self, name: str) -> Array:
        """Map the array `name`, read-only."""
        return np.asarray(np.load(self._path(name), mmap_mode="r", allow_pickle=False))

    def moved(self, name: str, array: Array) -> Array:
        """Keep `array`, and return it mapped."""
        self.put(name, array)
        return self.get(name)

    def has(self, name: str) -> bool:
        return self._path(name).exists()

    def drop(self, *names: str) -> None:
        for name in names:
            self._path(name).unlink(missing_ok=True)

    def bytes(self) -> int:
        """Return the bytes that the folder holds now."""
        return sum(entry.stat().st_size for entry in os.scandir(self.folder))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

"""The folder for what does not fit in memory: large weights, statistics and codes, an array a file.

Without a checkpoint it is a temporary folder, removed with the last object that uses it. Beside a checkpoint FILE it is
FILE.data, and stays: a later run goes on from there.
"""

import contextlib
import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from rdoq_onnx.errors import ConfigError, OutputError
from rdoq_onnx.model.external import SUFFIX, Place, Shelf, is_detached, place
from rdoq_onnx.system.atomic import reason

Array = NDArray[Any]
PARKED = 1 << 26  # bytes of sums that wait on the disk, not in memory
LEAST_PARKED = 1 << 16  # of an array of these
_SUFFIX = ".data"
_PREFIX = "rdoq-onnx-"
_KINDS = (".npy", ".part", SUFFIX)  # endings of what a folder holds


@dataclass(eq=False)
class Scratch:
    """Arrays by name in a folder that is made when the first one arrives.

    parent: where to make a temporary folder; None for the system's. checkpoint: the file that the folder belongs to,
    if any. identity: of the measurement that the folder of a checkpoint is for, once it is bound to one.
    """

    parent: Path | None = None
    checkpoint: Path | None = None
    identity: str = field(default="", init=False)

    @cached_property
    def folder(self) -> Path:
        """The folder, made if need be. Raises OutputError."""
        try:
            if self.checkpoint is not None:
                self._beside.mkdir(exist_ok=True)
                if self.identity:
                    self._mark(self._beside)
                return self._beside
            made = tempfile.mkdtemp(prefix=_PREFIX, dir=self.parent)
        except OSError as error:
            where = self.parent or self.checkpoint or tempfile.gettempdir()
            raise OutputError(f"{where}: no scratch folder can be made ({reason(error)}); give --scratch") from error
        weakref.finalize(self, shutil.rmtree, made, ignore_errors=True)
        return Path(made).absolute()

    @cached_property
    def shelf(self) -> Shelf:
        """The files of large weights of models in memory."""
        return Shelf(lambda: self.folder)

    def free(self) -> tuple[int, str]:
        """Return the bytes that are free where the folder is or would be, and that place."""
        where = self.checkpoint.absolute().parent if self.checkpoint is not None else self.parent
        place = os.fspath(where or tempfile.gettempdir())
        return shutil.disk_usage(place).free, place

    def bind(self, identity: str) -> None:
        """Empty the folder of a checkpoint unless it was written under the same `identity`. Raises OutputError."""
        self.identity = identity
        if self.checkpoint is not None and self._beside.exists():
            self._mark(self.folder)

    def _mark(self, folder: Path) -> None:
        mark = folder / "identity"
        with contextlib.suppress(OSError):
            if mark.read_text() == self.identity:
                return
        for path in folder.iterdir():
            if path.suffix in _KINDS and path not in self.shelf.written:
                path.unlink(missing_ok=True)
        mark.write_text(self.identity)

    @property
    def _beside(self) -> Path:
        """The folder of the checkpoint."""
        assert self.checkpoint is not None
        return self.checkpoint.with_name(self.checkpoint.name + _SUFFIX).absolute()

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

    def name_of(self, array: Array) -> str | None:
        """Return the name of an array that `get` has mapped; None for any other."""
        mapped = array.base
        if not isinstance(mapped, np.memmap) or mapped.filename is None or array.shape != mapped.shape:
            return None
        path = Path(mapped.filename)
        return path.stem if path.parent == self.folder else None

    def moved(self, name: str, array: Array) -> Array:
        """Keep `array`, and return it mapped."""
        self.put(name, array)
        return self.get(name)

    def park(self, value: Any) -> Any:
        """Move the large arrays of a large value, of tuples and dicts, to files without a name, mapped read-only."""
        return self._parked(value) if bytes_in(value) >= PARKED else value

    def _parked(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._parked(each) for key, each in value.items()}
        if isinstance(value, tuple):
            return tuple(map(self._parked, value))
        if not isinstance(value, np.ndarray) or value.nbytes < LEAST_PARKED or isinstance(value.base, np.memmap):
            return value
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                file.write(np.ascontiguousarray(value).data)
                file.flush()
                return np.asarray(np.memmap(file, value.dtype, "r", shape=value.shape))
        except OSError as error:
            raise OutputError(f"{self.folder}: is full ({reason(error)}); give --scratch a larger folder") from error

    def has(self, name: str) -> bool:
        return self._path(name).exists()

    def names(self) -> list[str]:
        """List the arrays, in order."""
        return sorted(path.stem for path in self.folder.glob("*.npy"))

    def drop(self, *names: str) -> None:
        for name in names:
            self._path(name).unlink(missing_ok=True)

    def located(self, model: ModelProto, source: ModelProto) -> ModelProto:
        """Return `model`, which an earlier run made of `source`, with its detached tensors where they are now.

        They are in this folder, or where `source` has them. Raises ConfigError if they are in neither.
        """
        if not is_detached(model):
            return model
        places = {t.name: Place.of(t) for t in source.graph.initializer}
        result = ModelProto()
        result.CopyFrom(model)
        for tensor in result.graph.initializer:
            before = Place.of(tensor)
            if before is not None:
                now = self._own(before) or places.get(tensor.name)
                if now is None or now.length != before.length:
                    raise self.incomplete()
                place(tensor, now)
        return result

    def _own(self, before: Place) -> Place | None:
        path = self.folder / Path(before.path).name
        known = path.suffix == SUFFIX and path.is_file() and path.stat().st_size == before.length
        return Place(os.fspath(path), 0, before.length) if known else None

    def incomplete(self) -> ConfigError:
        """Return the error of a folder that lacks what its checkpoint refers to."""
        return ConfigError(f"--curves {self.checkpoint}: its folder {self.folder} is incomplete; delete both")

    def bytes(self) -> int:
        """Return the bytes that the folder holds now."""
        return sum(entry.stat().st_size for entry in os.scandir(self.folder))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"


@dataclass(eq=False)
class Carried(Scratch):
    """Arrays in memory, for work in another process. made: those that were put."""

    arrays: dict[str, Array] = field(default_factory=dict)
    made: dict[str, Array] = field(default_factory=dict, init=False)

    def put(self, name: str, array: Array) -> None:
        """Keep `array`."""
        self.arrays[name] = self.made[name] = array

    def get(self, name: str) -> Array:
        """Return the array `name`."""
        return self.arrays[name]

    def has(self, name: str) -> bool:
        return name in self.arrays


def bytes_in(value: Any) -> int:
    """Return the bytes of all arrays of a value of tuples and dicts."""
    if isinstance(value, dict | tuple):
        return sum(map(bytes_in, value.values() if isinstance(value, dict) else value))
    return value.nbytes if isinstance(value, np.ndarray) else 0

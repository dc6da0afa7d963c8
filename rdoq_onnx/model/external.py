"""Tensors whose values are in a file: large weights are mapped where they are read, and never copied with a model.

A *detached* tensor is external data of ONNX whose location is an absolute path. `values` maps it, so that its pages are
in memory only while somebody reads them. Models of DETACHED bytes and more have their large tensors detached when they
are read; what the passes make of these goes to the `Shelf` of the run.
"""

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import uses_external_data

from rdoq_onnx.errors import OutputError
from rdoq_onnx.model.protos import copy_fields, reads, without_initializers

DETACHED = 1 << 25  # bytes of a model's tensors from which on it is detached
LARGE = 1 << 16  # bytes of a detached tensor
HUGE = 1 << 30  # bytes of a model's weights in float from which on sessions keep no copies of them
_WHOLE_BYTES = "biuf"  # kinds of numpy whose bytes are those of ONNX; strings and types of 4 bits are not
SUFFIX = ".weights"  # of a file of the shelf
_SHELF: ContextVar["Shelf | None"] = ContextVar("shelf", default=None)

Array = NDArray[Any]


@dataclass(frozen=True)
class Place:
    """Where the values of a detached tensor are: `length` bytes of the file `path` from `offset` on."""

    path: str
    offset: int
    length: int

    @classmethod
    def of(cls, tensor: TensorProto) -> "Place | None":
        """Return the place of a detached tensor; None for any other."""
        if not uses_external_data(tensor):
            return None
        entries = {e.key: e.value for e in tensor.external_data}
        return cls(entries["location"], int(entries.get("offset", 0)), int(entries.get("length", 0)))


def is_detached(model: ModelProto) -> bool:
    """Whether any tensor of `model` is detached."""
    return any(map(uses_external_data, model.graph.initializer))


def values(tensor: TensorProto) -> Array:
    """Return the values of a tensor; those of a detached one are mapped, and read-only."""
    place = Place.of(tensor)
    if place is None:
        return np.asarray(numpy_helper.to_array(tensor))
    mapped = bytes_at(place)
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    if dtype.itemsize * math.prod(tensor.dims) == place.length:
        return np.asarray(mapped.view(dtype).reshape(tuple(tensor.dims)))
    packed = TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=mapped.tobytes())  # of 4 bits and less
    return np.asarray(numpy_helper.to_array(packed))


def stored(array: Array, name: str) -> TensorProto:
    """Return the tensor `name` with the values of `array`, on the run's shelf if there is one and it is large."""
    shelf = _SHELF.get()
    if shelf is None or array.nbytes < LARGE or array.dtype.kind not in _WHOLE_BYTES:
        return numpy_helper.from_array(np.asarray(array), name)
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    return shelf.put(TensorProto(name=name, data_type=kind, dims=array.shape), np.ascontiguousarray(array))


@contextlib.contextmanager
def taking(shelf: "Shelf | None") -> Iterator[None]:
    """Let `stored` use `shelf`, if there is one."""
    token = _SHELF.set(shelf)
    try:
        yield
    finally:
        _SHELF.reset(token)


def with_values(model: ModelProto, name: str, array: Array) -> ModelProto:
    """Return a copy of `model` in which the initializer `name` holds `array`."""
    result = without_initializers(model)
    result.graph.initializer.extend(stored(array, name) if t.name == name else t for t in model.graph.initializer)
    return result


def place(tensor: TensorProto, where: Place) -> None:
    """Make `tensor` refer to `where`, in place of what it holds."""
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", where.path), ("offset", where.offset), ("length", where.length)):
        tensor.external_data.add(key=key, value=str(value))


def shelved(tensor: TensorProto) -> TensorProto:
    """Move the bytes of a large `tensor` to the run's shelf, if there is one. Returns `tensor`."""
    shelf = _SHELF.get()
    if shelf is not None and len(tensor.raw_data) >= LARGE:
        shelf.put(tensor, np.frombuffer(tensor.raw_data, np.uint8))
    return tensor


def attached(model: ModelProto) -> ModelProto:
    """Return `model` with all values inside; itself if they are."""
    if not is_detached(model):
        return model
    result = ModelProto()
    result.CopyFrom(model)
    for tensor in result.graph.initializer:
        where = Place.of(tensor)
        if where is not None:
            tensor.raw_data = bytes_at(where).tobytes()
            del tensor.external_data[:]
            tensor.ClearField("data_location")
    return result


def bytes_at(where: Place) -> NDArray[np.uint8]:
    """Map the bytes of a detached tensor."""
    return np.asarray(np.memmap(where.path, np.uint8, "r", where.offset, (where.length,)))


def detached_bytes(model: ModelProto) -> int:
    """Return the bytes of detached tensors."""
    return sum(where.length for t in model.graph.initializer if (where := Place.of(t)))


def is_huge(model: ModelProto) -> bool:
    """Whether the large tensors of `model` take over HUGE bytes in float: sessions then make no copies of them."""
    sizes = (math.prod(t.dims) for t in model.graph.initializer)
    return bool(4 * sum(size for size in sizes if size >= LARGE) > HUGE)


def relocated(model: ModelProto) -> tuple[ModelProto, str]:
    """Return `model` with relative locations, and the folder that they start from.

    Returns `model` itself and no folder if nothing is detached.
    """
    places = [where for t in model.graph.initializer if (where := Place.of(t))]
    if not places:
        return model, ""
    folder = os.path.commonpath([Path(where.path).parent for where in places])
    result = ModelProto()
    result.CopyFrom(model)
    for tensor in result.graph.initializer:
        where = Place.of(tensor)
        if where is not None:
            place(tensor, replace(where, path=os.path.relpath(where.path, folder)))
    return result, folder


def without_detached(model: ModelProto) -> tuple[ModelProto, dict[str, TensorProto]]:
    """Return `model` with its detached tensors as inputs, and these; itself if there are none."""
    detached = {t.name: t for t in model.graph.initializer if Place.of(t)}
    if not detached:
        return model, {}
    result = without_initializers(model)
    result.graph.initializer.extend(t for t in model.graph.initializer if t.name not in detached)
    taken = {i.name for i in model.graph.input}
    result.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in detached.values() if t.name not in taken
    )
    return result, detached


def with_detached(model: ModelProto, detached: Mapping[str, TensorProto]) -> ModelProto:
    """Make the inputs that `without_detached` made tensors again, in place, as far as nodes read them."""
    if detached:
        read = set(reads(model.graph.node)) | {o.name for o in model.graph.output}
        inputs = [i for i in model.graph.input if i.name not in detached]
        del model.graph.input[:]
        model.graph.input.extend(inputs)
        model.graph.initializer.extend(t for name, t in detached.items() if name in read)
    return model


@dataclass
class Shelf:
    """Files that large tensors are moved to, in the folder that `at` makes when the first one arrives.

    A file's name is the hash of what it holds: later runs find their tensors there, and those of others stay. written:
    the files of this run.
    """

    at: Callable[[], Path]
    written: set[Path] = field(default_factory=set, init=False)

    def detached(self, model: ModelProto) -> ModelProto:
        """Return `model` with its large tensors here; itself if it has less than DETACHED bytes of them."""
        if sum(len(t.raw_data) for t in model.graph.initializer if len(t.raw_data) >= LARGE) < DETACHED:
            return model
        result = without_initializers(model)
        for tensor in model.graph.initializer:
            moved = len(tensor.raw_data) >= LARGE
            copy = result.graph.initializer.add()
            copy_fields(tensor, copy, skip={"raw_data"} if moved else set())
            if moved:
                self.put(copy, np.frombuffer(tensor.raw_data, np.uint8))
        return result

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(path.stat().st_size for path in self.written)

    def put(self, tensor: TensorProto, array: Array) -> TensorProto:
        """Write the bytes of `array` and make `tensor` refer to them. Returns `tensor`. Raises OutputError."""
        digest = hashlib.blake2b(array.data, digest_size=16).hexdigest()
        path = self.at() / f"{digest}{SUFFIX}"
        if not path.exists():
            part = path.with_suffix(".part")
            try:
                part.write_bytes(array.data)
                part.replace(path)
            except OSError as error:
                part.unlink(missing_ok=True)
                found = f"{path}: cannot be written ({error.strerror or error})"
                raise OutputError(f"{found}; give --scratch a larger folder") from error
        self.written.add(path)
        place(tensor, Place(os.fspath(path), 0, array.nbytes))
        return tensor

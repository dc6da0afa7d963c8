"""External data of ONNX: tensors in files beside the model's own. They are untrusted: only from the model's folder."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from rdoq_onnx.errors import ModelError
from rdoq_onnx.model.external import Place, bytes_at, place
from rdoq_onnx.model.protos import copy_fields, without_initializers
from rdoq_onnx.system.atomic import reason

PAGE = 4096  # bytes: page-aligned external data can be memory-mapped
INLINE = 1024  # bytes: smaller tensors stay in the model file
_MAX_ITEMSIZE = 16  # bytes per element


def check_location(path: Path, tensor: TensorProto) -> None:
    """Refuse external data that is not a plain file inside the model's folder."""
    entries = {entry.key: entry.value for entry in tensor.external_data}  # the last one counts, as in onnx
    location = Path(os.fsdecode(entries.get("location", "")))  # protobuf returns bytes for invalid UTF-8
    where = f"{path}: external data {str(location)!r} of tensor {tensor.name!r}"
    if location.is_absolute() or ".." in location.parts:
        raise ModelError(f"{where} lies outside the model's folder; move it there and save the model again")
    steps = [path.parent / Path(*location.parts[: n + 1]) for n in range(len(location.parts))]
    try:
        linked, present = any(step.is_symlink() for step in steps), bool(steps) and steps[-1].is_file()
    except (OSError, ValueError) as error:
        raise ModelError(f"{where} has no usable path ({reason(error)}); save the model again") from error
    if linked:
        raise ModelError(f"{where} is a symbolic link; copy the file itself into the model's folder")
    if not present:
        raise ModelError(f"{where} is missing; copy the file into the model's folder")


def load_external(path: Path, tensor: TensorProto) -> None:
    """Load a tensor's external data."""
    with _readable(path, tensor):
        _extent(path, tensor)
        load_external_data_for_tensor(tensor, str(path.parent))
        tensor.ClearField("data_location")  # as if it had never been external


def map_external(path: Path, tensor: TensorProto) -> None:
    """Make a tensor refer to its external data by an absolute path (see external.py)."""
    with _readable(path, tensor):
        place(tensor, _extent(path, tensor))


@contextlib.contextmanager
def _readable(path: Path, tensor: TensorProto) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # onnx raises ValueError, OSError and the checker's errors
        found = f"external data of tensor {tensor.name!r} cannot be read: {reason(error)}"
        raise ModelError(f"{path}: {found}; export the model again") from error


def _extent(path: Path, tensor: TensorProto) -> Place:
    """Return where a tensor's external data are, refusing data that are not in the file, or too long for it."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    file, offset = (path.parent / entries["location"]).absolute(), int(entries.get("offset", 0))
    rest = file.stat().st_size - offset
    length = int(entries.get("length", rest))
    if length > _MAX_ITEMSIZE * math.prod(tensor.dims):
        raise ValueError(f"it is longer than a tensor of shape {list(tensor.dims)}")
    if offset < 0 or length < 0 or length > rest:
        raise ValueError("the file ends before it")
    return Place(os.fspath(file), offset, length)


def outside_bytes(tensor: TensorProto) -> int:
    """Return the bytes that a tensor takes outside the model file, by its shape; 0 inside."""
    if not uses_external_data(tensor):
        return 0
    each = int(np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize)
    return int(math.prod(tensor.dims)) * each


def externalized(model: onnx.ModelProto, location: str, file: BinaryIO) -> onnx.ModelProto:
    """Write large initializers to `file` and return a copy that refers to them; they are never in memory twice."""
    shell = without_initializers(model)
    for tensor in model.graph.initializer:
        copy = shell.graph.initializer.add()
        data = data_of(tensor)
        if len(data) < INLINE:
            copy.CopyFrom(tensor)
        else:
            copy_fields(tensor, copy, skip={"raw_data", "external_data"})
            offset = file.seek(-(-file.tell() // PAGE) * PAGE)
            place(copy, Place(location, offset, file.write(data)))
    return shell


def data_of(tensor: TensorProto) -> memoryview | bytes:
    """Return the bytes of a tensor, mapped if it is detached."""
    where = Place.of(tensor)
    return tensor.raw_data if where is None else bytes_at(where).data

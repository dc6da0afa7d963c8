"""Read and write models with external data, and other files.

With atomic.py and calibration/array_files.py, the only module that touches the disk. Files that are read are untrusted:
no pickle, and external data only from the model's own folder.
"""

import contextlib
import hashlib
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from rdoq_onnx.errors import ConfigError, ModelError, OutputError
from rdoq_onnx.model.external import DETACHED, LARGE, Place, attached, bytes_at, place
from rdoq_onnx.model.protos import copy_fields, tensors
from rdoq_onnx.system.atomic import atomic, followed, lock_folder, reason

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LIMIT = 2**31 - 2**24  # bytes of tensors: protobuf writes under 2 GiB, names and nodes included
PAGE = 4096  # bytes: page-aligned external data can be memory-mapped
INLINE = 1024  # bytes: smaller tensors stay in the model file
_MAX_ITEMSIZE = 16  # bytes per element

PathLike = str | Path


def read_model(path: PathLike) -> onnx.ModelProto:
    """Read and check the model in `path`, external data included.

    Raises ModelError unless it is a complete, valid ONNX model.
    """
    path = Path(path)
    data, model = _read_bytes(path), onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError is untyped
        raise ModelError(f"{path}: is not an ONNX model, or is truncated; export or download it again") from error
    if not model.HasField("graph") or not model.graph.node:
        found = "a graph without nodes" if model.HasField("graph") else "no graph"
        raise ModelError(f"{path}: contains {found}; export the model again")
    outside = [t for t in _tensors(model) if uses_external_data(t)]
    for tensor in outside:
        _check_location(path, tensor)
    try:
        onnx.checker.check_model(path)  # by path, as the checker would serialize a model in memory
    except Exception as error:  # the checker also raises protobuf's and built-in exceptions
        raise ModelError(f"{path}: is not a valid ONNX model: {reason(error)}; export it again") from error
    mapped = set()
    if sum(map(_stored_bytes, model.graph.initializer)) + sum(map(_length, outside)) >= DETACHED:
        mapped = {id(t) for t in model.graph.initializer if _length(t) >= LARGE}
    for tensor in outside:
        (_map_external if id(tensor) in mapped else _load_external)(path, tensor)
    return model


def read_toml(path: PathLike) -> dict[str, Any]:
    """Read the TOML document in `path`. Raises ConfigError."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({reason(error)}); give a TOML file") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not valid TOML ({reason(error)}); correct it") from error


def check_output(path: PathLike, input_path: PathLike | None = None) -> None:
    """Check, before the long work, that `path` can be written and is not the input.

    Raises OutputError or ConfigError.
    """
    if str(path) == "-":
        raise OutputError("-: cannot write to standard output; give the path of a file (./- for one of that name)")
    path = Path(path)
    try:
        folder, exists = followed(path).parent, path.exists()
        if path.is_dir():
            raise OutputError(f"{path}: is a folder; give the path of a file")
        if exists and not path.is_file():
            raise OutputError(f"{path}: is a device or pipe; give the path of a file")
        if not folder.is_dir():
            raise OutputError(f"{path}: its folder {folder} does not exist; create it first")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(f"{path}: its folder {folder} is not writable; choose another one")
        if input_path is not None and exists and Path(input_path).exists() and path.samefile(input_path):
            raise ConfigError(f"{path}: output and input are the same file; give another output path")
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: is not a usable path ({reason(error)}); choose another") from error


def write_model(model: onnx.ModelProto, path: PathLike) -> None:
    """Write atomically; the tensors of a model over 2 GB go to `<name>.<digest of the tensors>.data` next to it.

    The same model gives the same bytes. Raises OutputError.
    """
    path = followed(Path(path))
    if sum(map(_stored_bytes, _tensors(model))) + sum(map(_length, model.graph.initializer)) <= LIMIT:
        with atomic(path) as (file,):
            file.write(attached(model).SerializeToString(deterministic=True))
        return
    # The digest in the name keeps a model from ever being paired with another model's data.
    data = path.with_name(f"{path.name}.{_digest(model)}.data")
    with lock_folder(path.parent):
        replaced = _data_files(path) - {data}
        with atomic(data, path) as (data_file, file):
            shell = _externalized(model, data.name, data_file)
            if sum(map(_stored_bytes, _tensors(shell))) > LIMIT:
                raise OutputError(f"{path}: subgraphs hold over 2 GB; move their tensors to the main graph")
            file.write(shell.SerializeToString(deterministic=True))
        for stale in replaced:
            with contextlib.suppress(OSError):
                stale.unlink()


def write_text(text: str, path: PathLike) -> None:
    """Write UTF-8 atomically. Raises OutputError."""
    with atomic(Path(path)) as (file,):
        file.write(text.encode())


def write_arrays(arrays: Mapping[str, NDArray[Any]], path: PathLike) -> None:
    """Write an .npz atomically. Raises OutputError."""
    with atomic(Path(path)) as (file,):
        np.savez(file, allow_pickle=False, **arrays)


def read_npz(path: PathLike) -> dict[str, NDArray[Any]]:
    """Read the arrays of an .npz by name. Raises whatever numpy raises for a broken file."""
    with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


def _read_bytes(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise ModelError(f"{path}: is a folder or device; give the path of an .onnx file")
        size = path.stat().st_size
        if size >= 2**31:
            raise ModelError(f"{path}: is over 2 GB, too large for one ONNX file; save it with external data")
        if size == 0:
            raise ModelError(f"{path}: is empty; export or download it again")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({reason(error)}); give an .onnx file") from error


def _tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every dense tensor of the model: initializers and attributes, including those in subgraphs and functions."""
    for graph in (model.graph, *model.functions):
        yield from tensors(graph)


def _stored_bytes(tensor: TensorProto) -> int:
    """An upper bound of the bytes that the values take in the file; ByteSize() would raise above 2 GB."""
    fixed = len(tensor.raw_data) + 4 * len(tensor.float_data) + 8 * len(tensor.double_data)
    varints = len(tensor.int32_data) + len(tensor.int64_data) + len(tensor.uint64_data)
    return fixed + 10 * varints + sum(map(len, tensor.string_data))


def _check_location(path: Path, tensor: TensorProto) -> None:
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


def _load_external(path: Path, tensor: TensorProto) -> None:
    """Load a tensor's external data."""
    with _readable(path, tensor):
        _extent(path, tensor)
        load_external_data_for_tensor(tensor, str(path.parent))
        tensor.ClearField("data_location")  # as if it had never been external


def _map_external(path: Path, tensor: TensorProto) -> None:
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


def _length(tensor: TensorProto) -> int:
    """Return the bytes that a tensor takes outside the model file, by its shape; 0 inside."""
    if not uses_external_data(tensor):
        return 0
    each = int(np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize)
    return int(math.prod(tensor.dims)) * each


def _externalized(model: onnx.ModelProto, location: str, file: BinaryIO) -> onnx.ModelProto:
    """Write large initializers to `file` and return a copy that refers to them; they are never in memory twice."""
    shell = onnx.ModelProto()
    copy_fields(model, shell, skip={"graph"})
    copy_fields(model.graph, shell.graph, skip={"initializer"})
    for tensor in model.graph.initializer:
        copy = shell.graph.initializer.add()
        data = _data(tensor)
        if len(data) < INLINE:
            copy.CopyFrom(tensor)
        else:
            copy_fields(tensor, copy, skip={"raw_data", "external_data"})
            offset = file.seek(-(-file.tell() // PAGE) * PAGE)
            place(copy, Place(location, offset, file.write(data)))
    return shell


def _digest(model: onnx.ModelProto) -> str:
    """Hash the tensors that go to the external data file."""
    state = hashlib.blake2b(digest_size=8)
    for tensor in model.graph.initializer:
        data = _data(tensor)
        if len(data) >= INLINE:
            state.update(len(data).to_bytes(8, "little"))
            state.update(data)
    return state.hexdigest()


def _data(tensor: TensorProto) -> memoryview | bytes:
    """Return the bytes of a tensor, mapped if it is detached."""
    where = Place.of(tensor)
    return tensor.raw_data if where is None else bytes_at(where).data


def _data_files(path: Path) -> set[Path]:
    """The data files that `write_model` wrote for the model now in `path`, if any."""
    pattern = re.compile(re.escape(path.name) + r"\.[0-9a-f]{16}\.data")
    try:
        candidates = {p for p in path.parent.iterdir() if pattern.fullmatch(p.name)}
        old = onnx.load(path, load_external_data=False) if candidates and path.is_file() else onnx.ModelProto()
    except Exception:  # not a model, or no such folder
        return set()
    used = {entry.value for tensor in _tensors(old) for entry in tensor.external_data if entry.key == "location"}
    return {p for p in candidates if p.name in used}

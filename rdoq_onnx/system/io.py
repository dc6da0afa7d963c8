"""Read and write models with external data, and other files.

With atomic.py, external_data.py, scratch.py, model/external.py and calibration/array_files.py, the only module that
touches the disk. Files that are read are untrusted: no pickle.
"""

import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto
from onnx.external_data_helper import uses_external_data

from rdoq_onnx.errors import ConfigError, ModelError, OutputError
from rdoq_onnx.model.external import DETACHED, LARGE, attached
from rdoq_onnx.model.protos import tensors
from rdoq_onnx.model.sizes import weights_as_inputs
from rdoq_onnx.model.validate import set_apart
from rdoq_onnx.system.atomic import atomic, followed, lock_folder, reason
from rdoq_onnx.system.external_data import (
    INLINE,
    check_location,
    data_of,
    externalized,
    load_external,
    map_external,
    outside_bytes,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LIMIT = 2**31 - 2**24  # bytes of tensors: protobuf writes under 2 GiB, names and nodes included

_TEXT = 1 << 26  # bytes of a text that is read

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
        check_location(path, tensor)
    try:
        apart = set_apart(model)
        # By path if possible, as the checker would serialize a model in memory.
        onnx.checker.check_model(path if apart is model else weights_as_inputs(apart))
    except Exception as error:  # the checker also raises protobuf's and built-in exceptions
        raise ModelError(f"{path}: is not a valid ONNX model: {reason(error)}; export it again") from error
    mapped = set()
    if sum(map(_stored_bytes, model.graph.initializer)) + sum(map(outside_bytes, outside)) >= DETACHED:
        mapped = {id(t) for t in model.graph.initializer if outside_bytes(t) >= LARGE}
    for tensor in outside:
        (map_external if id(tensor) in mapped else load_external)(path, tensor)
    return model


def read_toml(path: PathLike) -> dict[str, Any]:
    """Read the TOML document in `path`. Raises ConfigError."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({reason(error)}); give a TOML file") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not valid TOML ({reason(error)}); correct it") from error


def read_text(path: PathLike) -> str:
    """Read a text of at most `_TEXT` bytes. Raises ConfigError."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(_TEXT + 1)
        if len(data) > _TEXT:
            raise ConfigError(f"{path}: has more than {_TEXT >> 20} MiB; give a smaller file")
        return data.decode()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({reason(error)}); give a CSV file") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not UTF-8 text ({reason(error)}); give a CSV file") from error


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
    if sum(map(_stored_bytes, _tensors(model))) + sum(map(outside_bytes, model.graph.initializer)) <= LIMIT:
        with atomic(path) as (file,):
            file.write(attached(model).SerializeToString(deterministic=True))
        return
    # The digest in the name keeps a model from ever being paired with another model's data.
    data = path.with_name(f"{path.name}.{_digest(model)}.data")
    with lock_folder(path.parent):
        replaced = _data_files(path) - {data}
        with atomic(data, path) as (data_file, file):
            shell = externalized(model, data.name, data_file)
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


def _digest(model: onnx.ModelProto) -> str:
    """Hash the tensors that go to the external data file."""
    state = hashlib.blake2b(digest_size=8)
    for tensor in model.graph.initializer:
        data = data_of(tensor)
        if len(data) >= INLINE:
            state.update(len(data).to_bytes(8, "little"))
            state.update(data)
    return state.hexdigest()


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

"""Sample files of any size: only the requested rows are in memory.

Arrays that cannot be read row by row in place (compressed, or spread over many small files) are written once to an
unnamed temporary file, which disappears with the process.
"""

import os
import tempfile
import weakref
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from rdoq_onnx.calibration.rows import Rows
from rdoq_onnx.errors import CalibrationError

SMALL = 1 << 20  # bytes: smaller arrays are read whole
_CHUNK = 1 << 22  # bytes copied at a time
_LOCAL_HEADER = 30  # bytes of a zip member's header before its name; lengths of name and extra field at 26 and 28

Array = NDArray[Any]


class _Handle:
    """An open file, closed when its last reader is garbage-collected."""

    def __init__(self, file: BinaryIO) -> None:
        self._number = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._number)

    def read(self, into: NDArray[np.uint8], offset: int) -> None:
        if os.preadv(self._number, [into.data], offset) != len(into):
            raise CalibrationError("a sample file became shorter while it was read; run again and leave it unchanged")


@dataclass(frozen=True, eq=False)
class FileRows:
    """A C-ordered array in a file, from byte `start` on. offsets: where each row starts; None if they follow it."""

    handle: _Handle
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offsets: NDArray[np.int64] | None = None

    def __getitem__(self, rows: Any, /) -> Array:
        indices = np.arange(self.shape[0])[rows]
        result = np.empty((len(indices), *self.shape[1:]), self.dtype)
        if result.size:
            flat = result.reshape(len(indices), -1).view(np.uint8)
            starts = self.start + indices * flat.shape[1] if self.offsets is None else self.offsets[indices]
            for into, start in zip(flat, starts.tolist(), strict=True):
                self.handle.read(into, start)
        return result


class Spool(AbstractContextManager["Spool"]):
    """An array in a temporary file that grows along axis 0; its samples may have other shapes than `sample`."""

    def __init__(self, sample: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.sample, self.dtype, self.count, self.size = sample, dtype, 0, 0
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  closed by __exit__

    def append(self, array: Array) -> None:
        """Append samples of the spool's dtype. Raises CalibrationError if the disk is full."""
        with _disk_full_hint():
            self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)  # bfloat16 has no buffer
        self.count += len(array)
        self.size += array.nbytes

    def rows(self) -> FileRows:
        return replace(self.rows_at([], self.sample), shape=(self.count, *self.sample), offsets=None)

    def rows_at(self, offsets: Sequence[int], sample: tuple[int, ...]) -> FileRows:
        """The samples of the shape `sample` that start at `offsets`."""
        with _disk_full_hint():
            self._file.flush()
        starts = np.array(offsets, np.int64)
        return FileRows(_Handle(self._file), 0, (len(starts), *sample), self.dtype, starts)

    def __exit__(self, *_: object) -> None:
        self._file.close()


@contextmanager
def _disk_full_hint() -> Iterator[None]:
    """Turn an OSError from writing a temporary file into a CalibrationError with a fix."""
    try:
        yield
    except OSError as error:
        found = f"samples do not fit into {tempfile.gettempdir()} ({error.strerror})"
        raise CalibrationError(f"{found}; set TMPDIR or use fewer --samples") from error


def read_arrays(path: str | Path) -> dict[str, Rows]:
    """The arrays of an .npz by name, or that of an .npy as `x`, read row by row. Raises CalibrationError."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            if file.read(len(npy.MAGIC_PREFIX)) == npy.MAGIC_PREFIX:
                return {"x": _array(file, 0, path.stat().st_size)}
            with zipfile.ZipFile(file) as archive:
                members = [m for m in archive.infolist() if m.filename.endswith(".npy")]
                arrays = {m.filename.removesuffix(".npy"): _member(archive, m, file) for m in members}
                others = len(archive.infolist()) - len(members)
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror or error}); give an .npz or .npy") from error
    except CalibrationError as error:
        raise CalibrationError(f"{path}: {error}") from error
    except Exception as error:  # numpy, zipfile and zlib raise anything on arbitrary bytes
        raise CalibrationError(f"{path}: is not an .npz or .npy, or is truncated; write it with numpy.savez") from error
    if not arrays or others:
        raise CalibrationError(f"{path}: is an archive with something other than arrays; write it with numpy.savez")
    return arrays


def read_bytes(path: Path) -> bytes:
    """Read a whole file. Raises CalibrationError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror or error})") from error


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, file: BinaryIO) -> Rows:
    """An array of an .npz: read in place if it is stored uncompressed, else unpacked to a temporary file."""
    if member.compress_type == zipfile.ZIP_STORED:
        file.seek(member.header_offset)
        header = file.read(_LOCAL_HEADER)
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        for _ in _pieces(archive, member):  # verifies the checksum
            pass
        return _array(file, member.header_offset + _LOCAL_HEADER + lengths, member.file_size)
    with tempfile.TemporaryFile() as unpacked:
        for piece in _pieces(archive, member):
            with _disk_full_hint():
                unpacked.write(piece)
        with _disk_full_hint():
            unpacked.flush()
        return _array(unpacked, 0, member.file_size)


def _pieces(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
    with archive.open(member) as stream:
        while piece := stream.read(_CHUNK):
            yield piece


def _array(file: Any, start: int, size: int) -> Rows:
    """The .npy of `size` bytes that starts at `start` in `file`."""
    file.seek(start)
    major, _ = npy.read_magic(file)
    shape, fortran, dtype = npy.read_array_header_1_0(file) if major == 1 else npy.read_array_header_2_0(file)
    if dtype.hasobject:
        raise CalibrationError("holds an array of Python objects; save numbers only")
    offset, length = file.tell(), int(np.prod(shape, dtype=object)) * dtype.itemsize
    if offset - start + length > size:
        raise ValueError("truncated")
    if length <= SMALL or not dtype.itemsize:
        file.seek(start)
        whole: Array = npy.read_array(file, allow_pickle=False)
        return whole
    if not fortran or len(shape) == 1:
        return FileRows(_Handle(file), offset, shape, dtype)
    return _row_major(np.memmap(file, dtype, "r", offset, shape, "F"))


def _row_major(array: Array) -> FileRows:
    """Rewrite a Fortran-ordered array in C order."""
    with Spool(array.shape[1:], array.dtype) as spool:
        size = max(_CHUNK * len(array) // array.nbytes, 1)
        for first in range(0, len(array), size):
            spool.append(array[first : first + size])
        return spool.rows()

"""Files of samples, of any size: only the rows that are asked for are in memory.

Arrays that cannot be read by rows where they are (compressed, or many small files) are written once to a temporary
file, which has no name and goes with the process.
"""

import os
import tempfile
import weakref
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from rdoq_onnx.calibration.samples import Rows
from rdoq_onnx.errors import CalibrationError

SMALL = 1 << 20  # bytes: smaller arrays are read whole
_COPIED = 1 << 22  # bytes that are copied at a time
_LOCAL_HEADER = 30  # bytes of a member's header in a zip before its name; lengths of name and extra at 26 and 28

Array = NDArray[Any]


class _Handle:
    """An open file that is closed with the last one who reads from it."""

    def __init__(self, file: BinaryIO) -> None:
        self._number = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._number)

    def read(self, into: NDArray[np.uint8], offset: int) -> None:
        if os.preadv(self._number, [into.data], offset) != len(into):
            raise CalibrationError("a file of samples became shorter while it was read; leave it alone and run again")


@dataclass(frozen=True, eq=False)
class FileRows:
    """An array in C order in a file, from the byte `start` on."""

    handle: _Handle
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __getitem__(self, rows: Any, /) -> Array:
        picked = np.arange(self.shape[0])[rows]
        found = np.empty((len(picked), *self.shape[1:]), self.dtype)
        if found.size:
            flat = found.reshape(len(picked), -1).view(np.uint8)
            for into, row in zip(flat, picked.tolist(), strict=True):
                self.handle.read(into, self.start + row * flat.shape[1])
        return found


class Spool(AbstractContextManager["Spool"]):
    """An array that grows on axis 0, in a temporary file."""

    def __init__(self, sample: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.sample, self.dtype, self.count = sample, dtype, 0
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  closed by __exit__

    def append(self, array: Array) -> None:
        """Add samples of the shape and type that all have. Raises CalibrationError if the disk is full."""
        with _room():
            self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)  # bfloat16 has no buffer
        self.count += len(array)

    def rows(self) -> FileRows:
        with _room():
            self._file.flush()
        return FileRows(_Handle(self._file), 0, (self.count, *self.sample), self.dtype)

    def __exit__(self, *_: object) -> None:
        self._file.close()


@contextmanager
def _room() -> Iterator[None]:
    """Around what is written to a temporary file."""
    try:
        yield
    except OSError as error:
        found = f"samples do not fit into {tempfile.gettempdir()} ({error.strerror})"
        raise CalibrationError(f"{found}; set TMPDIR or give fewer --samples") from error


def read_arrays(path: str | Path) -> dict[str, Rows]:
    """Arrays of an .npz by name, or that of an .npy as `x`, none of them whole in memory. Raises CalibrationError."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            if file.read(len(npy.MAGIC_PREFIX)) == npy.MAGIC_PREFIX:
                return {"x": _array(file, 0, path.stat().st_size)}
            with zipfile.ZipFile(file) as archive:
                names = [m for m in archive.infolist() if m.filename.endswith(".npy")]
                arrays = {m.filename.removesuffix(".npy"): _member(archive, m, file) for m in names}
                strangers = len(archive.infolist()) - len(names)
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror or error}); give an .npz or .npy") from error
    except CalibrationError as error:
        raise CalibrationError(f"{path}: {error}") from error
    except Exception as error:  # numpy, zipfile and zlib meet any bytes whatever
        raise CalibrationError(f"{path}: is no .npz or .npy, or is truncated; use numpy.savez") from error
    if not arrays or strangers:
        raise CalibrationError(f"{path}: is an archive of something else than arrays; write it with numpy.savez")
    return arrays


def read_bytes(path: Path) -> bytes:
    """Raises CalibrationError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror or error})") from error


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, file: BinaryIO) -> Rows:
    """An array of an .npz: where it lies if it is stored as it is, else unpacked to a temporary file."""
    if member.compress_type == zipfile.ZIP_STORED:
        file.seek(member.header_offset)
        header = file.read(_LOCAL_HEADER)
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        for _ in _pieces(archive, member):  # compares the checksum
            pass
        return _array(file, member.header_offset + _LOCAL_HEADER + lengths, member.file_size)
    with tempfile.TemporaryFile() as unpacked:
        for piece in _pieces(archive, member):
            with _room():
                unpacked.write(piece)
        with _room():
            unpacked.flush()
        return _array(unpacked, 0, member.file_size)


def _pieces(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
    with archive.open(member) as stream:
        while piece := stream.read(_COPIED):
            yield piece


def _array(file: Any, start: int, size: int) -> Rows:
    """The .npy of `size` bytes that begins at `start` in `file`."""
    file.seek(start)
    major, _ = npy.read_magic(file)
    shape, fortran, dtype = npy.read_array_header_1_0(file) if major == 1 else npy.read_array_header_2_0(file)
    if dtype.hasobject:
        raise CalibrationError("holds an array of Python objects; save numbers only")
    offset, wanted = file.tell(), int(np.prod(shape, dtype=object)) * dtype.itemsize
    if offset - start + wanted > size:
        raise ValueError("truncated")
    if wanted <= SMALL or not dtype.itemsize:
        file.seek(start)
        whole: Array = npy.read_array(file, allow_pickle=False)
        return whole
    if not fortran or len(shape) == 1:
        return FileRows(_Handle(file), offset, shape, dtype)
    return _in_rows(np.memmap(file, dtype, "r", offset, shape, "F"))


def _in_rows(array: Array) -> FileRows:
    """`array`, which is stored by columns, written again by rows."""
    with Spool(array.shape[1:], array.dtype) as spool:
        size = max(_COPIED * len(array) // array.nbytes, 1)
        for first in range(0, len(array), size):
            spool.append(array[first : first + size])
        return spool.rows()

"""Sample files: only requested rows are read, whatever the format; broken files are refused by name."""

import gc
import io
import os
import pickle  # makes the file that must be refused
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from rdoq_onnx.calibration import array_files
from rdoq_onnx.calibration.array_files import FileRows, Spool, read_arrays
from rdoq_onnx.calibration.load import load_samples
from rdoq_onnx.calibration.samples import InputSpec
from rdoq_onnx.errors import CalibrationError

ARRAY = np.random.default_rng(0).standard_normal((300, 33, 40)).astype(np.float32)


def test_read_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", one=np.arange(3), two=np.ones(2), scalar=np.int64(5))
    np.save(tmp_path / "b.npy", np.arange(4))
    read = read_arrays(tmp_path / "a.npz")
    assert list(read) == ["one", "two", "scalar"]
    assert read["one"][...].tolist() == [0, 1, 2]
    assert read["scalar"][...] == 5
    assert read_arrays(str(tmp_path / "b.npy"))["x"][...].tolist() == [0, 1, 2, 3]


WRITERS = {
    "plain.npy": lambda path: np.save(path, ARRAY),
    "columns.npy": lambda path: np.save(path, np.asfortranarray(ARRAY)),
    "stored.npz": lambda path: np.savez(path, y=np.arange(9), x=ARRAY),
    "packed.npz": lambda path: np.savez_compressed(path, x=ARRAY),
}


@pytest.mark.parametrize("name", WRITERS)
def test_large_arrays_are_read_by_rows(tmp_path, name):
    WRITERS[name](tmp_path / name)
    rows = read_arrays(tmp_path / name)["x"]
    assert isinstance(rows, FileRows)
    assert (rows.shape, rows.dtype) == (ARRAY.shape, ARRAY.dtype)
    for picked in (slice(3, 9), np.array([299, 0, 7, 7]), slice(None), np.array([], int)):
        np.testing.assert_array_equal(rows[picked], ARRAY[picked])


def test_a_file_stays_open_as_long_as_it_is_read(tmp_path):
    np.save(tmp_path / "x.npy", ARRAY)
    rows = read_arrays(tmp_path / "x.npy")["x"]
    (tmp_path / "x.npy").unlink()
    np.testing.assert_array_equal(rows[:2], ARRAY[:2])
    if Path("/proc/self/fd").is_dir():
        before = open_files()
        del rows
        gc.collect()
        assert open_files() < before


def open_files():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_a_file_that_shrinks_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", ARRAY)
    rows = read_arrays(tmp_path / "x.npy")["x"]
    os.truncate(tmp_path / "x.npy", 1000)
    with pytest.raises(CalibrationError, match="shorter"):
        rows[:1]


def test_a_corrupted_byte_is_detected(tmp_path):
    np.savez(tmp_path / "a.npz", x=ARRAY)
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(CalibrationError, match="is no"):
        read_arrays(tmp_path / "a.npz")


@pytest.mark.parametrize("dtype", [np.int16, helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)])
def test_spool(dtype):
    with Spool((2,), np.dtype(dtype)) as spool:
        for first in (0, 3):
            spool.append(np.arange(first, first + 6).astype(dtype).reshape(3, 2))
        rows = spool.rows()
    assert rows[...].tolist() == [[0, 1], [2, 3], [4, 5], [3, 4], [5, 6], [7, 8]]


def test_a_full_disk_is_reported(monkeypatch, tmp_path):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((4, 3), np.float32))
    monkeypatch.setattr(array_files.tempfile, "TemporaryFile", Full)
    with Spool((), np.dtype(np.int8)) as spool, pytest.raises(CalibrationError, match=r"No space left.*TMPDIR"):
        spool.append(np.zeros(3, np.int8))
    with pytest.raises(CalibrationError, match=r"a.npz: samples do not fit .*No space left.*TMPDIR"):
        read_arrays(tmp_path / "a.npz")


def test_samples_of_a_large_file_are_never_all_in_memory(tmp_path):
    many = np.zeros((4000, 8, 32, 32), np.float16)
    np.save(tmp_path / "x.npy", many)
    size = many.nbytes
    del many
    tracemalloc.start()
    try:
        samples = load_samples(tmp_path / "x.npy", [InputSpec("x", np.dtype(np.float32), (None, 8, 32, 32))], None)
        for part in samples.split(0.7, 0):
            for feeds in part.batches(16):
                assert feeds["x"].dtype == np.float32
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 60e6
    assert peak < 60e6  # blocks of 16 MB, as they are and as float32


def refusal(path):
    with pytest.raises(CalibrationError) as caught:
        read_arrays(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_read_arrays_refuses(tmp_path):
    objects = np.array([{}, []], dtype=object)
    np.savez(tmp_path / "objects.npz", a=objects)
    np.save(tmp_path / "objects.npy", objects)
    np.savez(tmp_path / "none.npz")
    np.savez(tmp_path / "cut.npz", a=np.arange(1000))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:500])
    np.save(tmp_path / "cut.npy", np.arange(1000))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:500])
    (tmp_path / "empty.npz").touch()
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "code.npy").write_bytes(pickle.dumps([1]))
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as archive:
        archive.writestr("a.txt", "hello")
    (tmp_path / "folder").mkdir()
    cases = {
        "objects.npz": "Python objects",
        "objects.npy": "Python objects",
        "none.npz": "archive with something",
        "zip.npz": "archive with something",
        "cut.npz": "truncated",
        "cut.npy": "truncated",
        "empty.npz": "not an .npz",
        "text.npz": "not an .npz",
        "code.npy": "not an .npz",
        "missing.npz": "No such file",
        "folder": "directory",
    }
    for name, found in cases.items():
        message = refusal(tmp_path / name)
        assert message.startswith(f"{tmp_path / name}: ")
        assert found in message

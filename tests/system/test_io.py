"""Reading broken or hostile files; writing all or nothing."""

import os
import stat
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper, parser

from rdoq_onnx.errors import ConfigError, ModelError, OutputError
from rdoq_onnx.system import external_data, io

HEADER = '<ir_version: 8, opset_import: ["": 17]>'
TEXT = HEADER + "g (float[N,3] x) => (float[N,3] y) { y = Add(x, w) }"


@pytest.fixture
def model():
    made = parser.parse_model(TEXT)
    made.graph.initializer.append(numpy_helper.from_array(np.arange(3, dtype=np.float32), "w"))
    return made


@pytest.fixture
def stored(model, tmp_path):
    path = tmp_path / "in.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def refusal(error, call, *arguments):
    """The one-line message with which `call` refuses."""
    with pytest.raises(error) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def external(model, path, location):
    """Write `model` with w in `location`."""
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    tensor.external_data.add(key="location", value=location)
    path.write_bytes(model.SerializeToString())


def test_read(model, stored):
    assert io.read_model(stored) == model
    assert io.read_model(str(stored)) == model


def without_nodes():
    return parser.parse_model(HEADER + "g (float[N] x) => (float[N] x) { }").SerializeToString()


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not an ONNX model"),
        (bytes(range(256)), "not an ONNX model"),
        (onnx.ModelProto(ir_version=8).SerializeToString(), "contains no graph"),
        (without_nodes(), "contains a graph without nodes"),
        (parser.parse_model(TEXT).SerializeToString(), "'w'"),
        (parser.parse_model(TEXT.replace("Add(x, w)", "Foo(x)")).SerializeToString(), "No Op registered for Foo"),
    ],
)
def test_read_refuses(tmp_path, data, found):
    path = tmp_path / "bad.onnx"
    path.write_bytes(data)
    message = refusal(ModelError, io.read_model, path)
    assert message.startswith(f"{path}: ")
    assert found in message


def test_read_refuses_truncation_at_any_byte(stored):
    data = stored.read_bytes()
    for length in range(1, len(data)):
        stored.write_bytes(data[:length])
        assert str(stored) in refusal(ModelError, io.read_model, stored)


def test_read_refuses_paths(tmp_path):
    assert "No such file" in refusal(ModelError, io.read_model, tmp_path / "none.onnx")
    assert "folder" in refusal(ModelError, io.read_model, tmp_path)
    assert "device" in refusal(ModelError, io.read_model, "/dev/zero")
    assert "null byte" in refusal(ModelError, io.read_model, "a\0b")
    assert "too long" in refusal(ModelError, io.read_model, "a" * 5000)


def test_read_refuses_over_2_gb(tmp_path):
    path = tmp_path / "big.onnx"
    with path.open("wb") as file:
        file.truncate(2**31)
    assert "over 2 GB" in refusal(ModelError, io.read_model, path)


@pytest.mark.parametrize("location", ["w.bin", "sub/w.bin"])
def test_read_external(model, tmp_path, location):
    (tmp_path / "sub").mkdir()
    (tmp_path / location).write_bytes(np.arange(3, dtype=np.float32).tobytes())
    original = model.graph.initializer[0].raw_data
    external(model, tmp_path / "m.onnx", location)
    read = io.read_model(tmp_path / "m.onnx").graph.initializer[0]
    assert read.raw_data == original
    assert not read.HasField("data_location")


def test_read_external_refuses(model, tmp_path):
    folder, path = tmp_path / "folder", tmp_path / "folder" / "m.onnx"
    folder.mkdir()
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(12))
    (folder / "link").symlink_to(secret)
    (folder / "up").symlink_to(tmp_path)
    cases = {
        str(secret): "outside",
        "../secret": "outside",
        "link": "symbolic link",
        "up/secret": "symbolic link",
        "none": "missing",
        "": "missing",
        "a\0b": "'w'",
        "a" * 5000: "'w'",
    }
    for location, found in cases.items():
        external(model, path, location)
        message = refusal(ModelError, io.read_model, path)
        assert str(path) in message
        assert "'w'" in message
        assert found in message


def test_read_external_refuses_a_location_that_is_not_utf8(model, tmp_path):
    external(model, tmp_path / "m.onnx", "absent")
    data = (tmp_path / "m.onnx").read_bytes()
    (tmp_path / "m.onnx").write_bytes(data.replace(b"absent", b"abs\xff\xfet"))
    assert "is missing" in refusal(ModelError, io.read_model, tmp_path / "m.onnx")


def test_read_external_last_location_counts(model, tmp_path):
    external(model, tmp_path / "m.onnx", "w.bin")
    (tmp_path / "w.bin").write_bytes(bytes(12))
    model.graph.initializer[0].external_data.add(key="location", value="/etc/passwd")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert "outside" in refusal(ModelError, io.read_model, tmp_path / "m.onnx")


def test_read_external_refuses_wrong_extent(model, tmp_path):
    (tmp_path / "w.bin").write_bytes(bytes(12))
    external(model, tmp_path / "m.onnx", "w.bin")
    model.graph.initializer[0].external_data.add(key="length", value="99")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    message = refusal(ModelError, io.read_model, tmp_path / "m.onnx")
    assert "'w' cannot be read" in message


def test_check_output(stored, tmp_path):
    io.check_output(tmp_path / "out.onnx", stored)
    io.check_output("out.onnx")
    assert "is a folder" in refusal(OutputError, io.check_output, tmp_path, stored)
    assert "does not exist" in refusal(OutputError, io.check_output, tmp_path / "no" / "out.onnx", stored)
    assert "does not exist" in refusal(OutputError, io.check_output, stored / "out.onnx", stored)
    assert "device" in refusal(OutputError, io.check_output, "/dev/null", stored)
    assert "too long" in refusal(OutputError, io.check_output, "a" * 5000, stored)


def test_check_output_refuses_the_input(stored, tmp_path):
    (tmp_path / "soft.onnx").symlink_to(stored)
    (tmp_path / "hard.onnx").hardlink_to(stored)
    for name in ("in.onnx", "soft.onnx", "hard.onnx", "../" + tmp_path.name + "/in.onnx"):
        path = tmp_path / name
        message = refusal(ConfigError, io.check_output, path, stored)
        assert message.startswith(str(path))
        assert "same file" in message


def test_check_output_refuses_unwritable_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root
    assert "not writable" in refusal(OutputError, io.check_output, tmp_path / "out.onnx")


def test_write(model, tmp_path):
    path = tmp_path / "out.onnx"
    path.write_text("old")
    io.write_model(model, path)
    assert io.read_model(path) == model
    first = path.read_bytes()
    io.write_model(model, path)
    assert path.read_bytes() == first
    io.write_text("é\n", str(tmp_path / "a.txt"))
    assert (tmp_path / "a.txt").read_bytes() == "é\n".encode()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "out.onnx"]


def test_write_keeps_the_umask(model, tmp_path):
    before = os.umask(0o027)
    try:
        io.write_model(model, tmp_path / "out.onnx")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out.onnx").stat().st_mode) == 0o640


def test_write_over_2_gb(model, tmp_path, monkeypatch):
    monkeypatch.setattr(io, "LIMIT", 4000)
    model.doc_string = "kept"
    model.metadata_props.add(key="k", value="v")
    for name in ("a", "b"):
        array = np.random.default_rng(0).standard_normal((20, 30)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    before = model.SerializeToString()
    path = tmp_path / "out.onnx"
    io.write_model(model, path)
    assert model.SerializeToString() == before
    (data,) = tmp_path.glob("out.onnx.*.data")
    assert sorted(tmp_path.iterdir()) == [path, data]
    assert path.stat().st_size < 1000
    assert io.read_model(path) == model
    locations = {e.key: e.value for e in onnx.load(path, load_external_data=False).graph.initializer[2].external_data}
    assert locations == {"location": data.name, "offset": str(external_data.PAGE), "length": "2400"}


def test_write_refuses_2_gb_outside_initializers(model, tmp_path, monkeypatch):
    monkeypatch.setattr(io, "LIMIT", 10)
    path = tmp_path / "out.onnx"
    assert "subgraphs hold over 2 GB" in refusal(OutputError, io.write_model, model, path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_write_failure_leaves_the_old_file(model, tmp_path, monkeypatch, broken):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    path = tmp_path / "out.onnx"
    path.write_text("old")
    monkeypatch.setattr(*((os, "fsync", fail) if broken == "fsync" else (Path, "replace", fail)))
    message = refusal(OutputError, io.write_model, model, path)
    assert message.startswith(f"{path}: ")
    assert "No space left on device" in message
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]
    assert path.read_text() == "old"


def test_write_interrupted_leaves_nothing(model, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        io.write_model(model, tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


def test_write_refuses_paths(model, tmp_path):
    assert "is a folder" in refusal(OutputError, io.write_model, model, tmp_path)
    assert "No such file" in refusal(OutputError, io.write_text, "a", tmp_path / "no" / "a.txt")
    assert "null byte" in refusal(OutputError, io.write_text, "a", tmp_path / "a\0b")

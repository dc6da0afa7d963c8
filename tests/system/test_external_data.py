"""External data of large models: mapped where they are read, written again as one file or two."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper, parser

from rdoq_onnx.analysis.normalization import read_normalized
from rdoq_onnx.errors import ModelError
from rdoq_onnx.model import external
from rdoq_onnx.model.external import LARGE, Place, Shelf
from rdoq_onnx.system import io

TEXT = """<ir_version: 10, opset_import: ["": 21]> g (float[N, 128] x) => (float[N, 4] y)
    { a = MatMul (x, w) b = Add (a, h) y = MatMul (b, v) }"""
SHAPES = {"w": (128, 160), "h": (160,), "v": (160, 4)}


@pytest.fixture
def model():
    made, rng = parser.parse_model(TEXT), np.random.default_rng(0)
    made.graph.initializer.extend(numpy_helper.from_array(rng.random(s, np.float32), n) for n, s in SHAPES.items())
    return made


@pytest.fixture
def path(model, tmp_path, monkeypatch):
    """Return the path of `model` with w in a file of its own, and let it count as large."""
    monkeypatch.setattr(io, "DETACHED", 1)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensor = copy.graph.initializer[0]
    (tmp_path / "w.bin").write_bytes(bytes(100) + tensor.raw_data + bytes(50))
    external.place(tensor, Place("w.bin", 100, len(tensor.raw_data)))
    (tmp_path / "in.onnx").write_bytes(copy.SerializeToString())
    return tmp_path / "in.onnx"


def located(path, **entries):
    """Write other entries of w's external data; None drops one."""
    model = onnx.load(path, load_external_data=False)
    tensor = model.graph.initializer[0]
    merged = {e.key: e.value for e in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, value in merged.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString())


def test_large_tensors_of_large_models_are_mapped(model, path):
    read = io.read_model(path)
    assert Place.of(read.graph.initializer[0]) == Place(str(path.with_name("w.bin")), 100, 128 * 160 * 4)
    assert external.attached(read) == model
    assert not external.values(read.graph.initializer[0]).flags.writeable


def test_small_models_are_read(model, path, monkeypatch):
    monkeypatch.setattr(io, "DETACHED", 1 << 20)
    assert io.read_model(path) == model


def test_small_tensors_are_read(model, path):
    copy = onnx.load(path, load_external_data=False)
    (path.parent / "v.bin").write_bytes(copy.graph.initializer[2].raw_data)
    external.place(copy.graph.initializer[2], Place("v.bin", 0, 160 * 4 * 4))
    path.write_bytes(copy.SerializeToString())
    read = io.read_model(path)
    assert [Place.of(t) is None for t in read.graph.initializer] == [False, True, True]
    assert external.attached(read) == model


def test_a_tensor_without_length_ends_where_its_shape_ends(model, path):
    located(path, length=None, offset=None)
    path.with_name("w.bin").write_bytes(model.graph.initializer[0].raw_data)
    assert external.attached(io.read_model(path)) == model


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        ({"offset": 151}, "cannot be read"),
        ({"length": 128 * 160 * 64}, "cannot be read"),
        ({"offset": 1 << 40, "length": None}, "cannot be read"),
        ({"length": "many"}, "cannot be read"),
        ({"location": "../w.bin"}, "outside"),
        ({"location": "/etc/passwd"}, "outside"),
        ({"location": "none"}, "missing"),
    ],
)
def test_refusals(path, entries, found):
    located(path, **entries)
    with pytest.raises(ModelError) as caught:
        io.read_model(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "'w'" in message
    assert found in message
    assert "\n" not in message


def test_a_file_that_is_too_short(path):
    data = path.with_name("w.bin").read_bytes()
    path.with_name("w.bin").write_bytes(data[:LARGE])
    with pytest.raises(ModelError, match="tensor 'w' cannot be read") as caught:
        io.read_model(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("more", [-4, 4])
def test_another_length_than_that_of_the_shape(path, more):
    located(path, length=128 * 160 * 4 + more)
    with pytest.raises(ModelError, match=r"tensor 'w' is of shape .*, but its data has another size"):
        read_normalized(path)


def test_a_model_of_4_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "DETACHED", 1)
    model = parser.parse_model("""<ir_version: 10, opset_import: ["": 21]> g (float s) => (float[512, 513] y)
        { y = DequantizeLinear (w, s) }""")
    numbers = np.random.default_rng(0).integers(-7, 8, (512, 513))
    packed = onnx.helper.make_tensor("w", TensorProto.INT4, numbers.shape, numbers.ravel())
    tensor = numpy_helper.from_array(numpy_helper.to_array(packed), "w")
    (tmp_path / "w.bin").write_bytes(tensor.raw_data)
    external.place(tensor, Place("w.bin", 0, len(tensor.raw_data)))
    model.graph.initializer.append(tensor)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    (read,) = io.read_model(tmp_path / "m.onnx").graph.initializer
    assert Place.of(read).length == 512 * 513 // 2
    np.testing.assert_array_equal(external.values(read).astype(int), numbers)


@pytest.fixture
def detached(model, tmp_path, monkeypatch):
    monkeypatch.setattr(external, "DETACHED", 1)
    (tmp_path / "shelf").mkdir()
    return Shelf(lambda: tmp_path / "shelf").detached(model)


def test_a_detached_model_is_written_as_one_file(model, detached, tmp_path):
    (tmp_path / "out").mkdir()
    io.write_model(detached, tmp_path / "out" / "m.onnx")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["m.onnx"]
    onnx.checker.check_model(tmp_path / "out" / "m.onnx", full_check=True)
    assert onnx.load(tmp_path / "out" / "m.onnx") == model


def test_a_detached_model_over_2_gb_is_written_as_two(model, detached, tmp_path, monkeypatch):
    monkeypatch.setattr(io, "LIMIT", 70_000)
    out = tmp_path / "out"
    out.mkdir()
    io.write_model(detached, out / "m.onnx")
    (data,) = out.glob("m.onnx.*.data")
    assert len(list(out.iterdir())) == 2
    onnx.checker.check_model(out / "m.onnx", full_check=True)
    assert io.read_model(out / "m.onnx") == model
    other = tmp_path / "other"
    other.mkdir()
    io.write_model(model, other / "m.onnx")
    assert (other / data.name).read_bytes() == data.read_bytes()
    assert (other / "m.onnx").read_bytes() == (out / "m.onnx").read_bytes()

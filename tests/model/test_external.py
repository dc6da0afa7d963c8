"""Detached tensors: equal values, untouched by edits, and the same outputs from ONNX Runtime."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from rdoq_onnx.analysis.normalization import read_normalized
from rdoq_onnx.errors import OutputError
from rdoq_onnx.gradients.reverse import reverse_model
from rdoq_onnx.model import external, surgeon
from rdoq_onnx.model.equality import same
from rdoq_onnx.model.external import LARGE, Place, Shelf, stored, taking
from rdoq_onnx.system.runtime import Runtime

RUNTIME = Runtime("cpu", 1)
KINDS = (np.float32, np.float16, np.int64, np.int8, np.bool_)


@pytest.fixture
def shelf(tmp_path):
    return Shelf(lambda: tmp_path)


def network():
    """Return a model of two layers whose first weight is large, and feeds."""
    rng = np.random.default_rng(0)
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]> g (float[2, 3, 128] x) => (float[2, 3, 4] y)
    { a = MatMul (x, w) b = Tanh (a) c = Add (b, h) y = MatMul (c, v) }""")
    weights = {"w": (128, 160), "h": (160,), "v": (160, 4)}
    model.graph.initializer.extend(
        numpy_helper.from_array(rng.normal(0, 0.1, s).astype("f"), n) for n, s in weights.items()
    )
    return model, {"x": rng.standard_normal((2, 3, 128), np.float32)}


@pytest.fixture
def detached(shelf, monkeypatch):
    """Return the model of `network`, the same with its large weight on the shelf, and feeds."""
    monkeypatch.setattr(external, "DETACHED", 1)
    model, feeds = network()
    return model, shelf.detached(model), feeds


def places(model):
    return {t.name: Place.of(t) for t in model.graph.initializer if Place.of(t)}


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_a_detached_tensor(shelf, kind):
    array = np.random.default_rng(0).integers(0, 2, (300, 5, 7)).astype(kind)
    tensor = numpy_helper.from_array(array, "t")
    shelf.put(moved := TensorProto(name="t", data_type=tensor.data_type, dims=tensor.dims), array)
    values = external.values(moved)
    assert values.dtype == array.dtype
    np.testing.assert_array_equal(values, array)
    assert not values.flags.writeable
    np.testing.assert_array_equal(external.values(tensor), array)
    assert Place.of(tensor) is None


def test_values_of_a_detached_tensor_of_4_bits(shelf):
    numbers = np.arange(-7, 8).reshape(3, 5)
    tensor = helper.make_tensor("t", TensorProto.INT4, numbers.shape, numbers.ravel())
    packed = numpy_helper.from_array(numpy_helper.to_array(tensor), "t")
    moved = TensorProto(name="t", data_type=TensorProto.INT4, dims=numbers.shape)
    shelf.put(moved, np.frombuffer(packed.raw_data, np.uint8))
    assert Place.of(moved).length == 8
    np.testing.assert_array_equal(external.values(moved).astype(int), numbers)


def test_large_arrays_go_to_the_shelf_of_the_run(shelf):
    large, small = np.zeros(LARGE // 4, np.float32), np.zeros(LARGE // 4 - 1, np.float32)
    assert Place.of(stored(large, "t")) is None
    with taking(shelf):
        assert Place.of(stored(small, "t")) is None
        assert Place.of(stored(large, "t")).length == LARGE
    assert Place.of(stored(large, "t")) is None
    with taking(shelf), taking(None):
        assert Place.of(stored(large, "t")) is None


@pytest.mark.parametrize("array", [np.array(["text"] * LARGE), np.ones(LARGE, ml_dtypes.int4)], ids=["text", "4 bits"])
def test_arrays_whose_bytes_are_not_those_of_onnx_stay(shelf, array):
    array = array.astype(object) if array.dtype.kind == "U" else array
    with taking(shelf):
        tensor = stored(array, "t")
    assert Place.of(tensor) is None
    assert (numpy_helper.to_array(tensor).astype(array.dtype) == array).all()


def test_views_are_stored_in_their_order(shelf):
    array = np.arange(LARGE, dtype=np.int32).reshape(256, -1).T
    with taking(shelf):
        np.testing.assert_array_equal(external.values(stored(array, "t")), array)


def test_detaching_leaves_the_model_and_small_models(shelf, monkeypatch):
    model, _ = network()
    before = model.SerializeToString()
    assert shelf.detached(model) is model
    monkeypatch.setattr(external, "DETACHED", 128 * 160 * 4)
    moved = shelf.detached(model)
    assert model.SerializeToString() == before
    assert list(places(moved)) == ["w"]
    assert external.is_detached(moved)
    assert not external.is_detached(model)
    assert external.attached(moved) == model
    assert external.attached(model) is model
    monkeypatch.setattr(external, "DETACHED", 128 * 160 * 4 + 1)
    assert shelf.detached(model) is model


def test_the_same_values_are_stored_once(shelf, tmp_path, monkeypatch):
    first, second = (shelf.put(TensorProto(name=n), np.arange(9)) for n in "ab")
    assert Place.of(first) == Place.of(second)
    written = set(tmp_path.iterdir())
    again = Shelf(lambda: tmp_path)
    assert Place.of(again.put(TensorProto(), np.arange(9))) == Place.of(first)
    again.put(TensorProto(), np.arange(8))
    assert written < set(tmp_path.iterdir())
    np.testing.assert_array_equal(external.bytes_at(Place.of(first)).view(np.int64), np.arange(9))


def test_a_full_disk(shelf, tmp_path, monkeypatch):
    def full(path, data):
        path.open("wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OutputError, match=r"No space left on device\); give --scratch"):
        shelf.put(TensorProto(), np.arange(9))
    assert not list(tmp_path.iterdir())


def test_locations_can_be_relative(detached, tmp_path):
    model, moved, _ = detached
    result, folder = external.relocated(moved)
    size = external.detached_bytes(moved)
    assert (folder, size) == (str(tmp_path), 128 * 160 * 4)
    (place,) = places(result).values()
    assert tmp_path / place.path == tmp_path / places(moved)["w"].path
    assert "/" not in place.path
    assert external.relocated(model) == (model, "")
    assert external.relocated(model)[0] is model


def test_detached_tensors_can_be_inputs_for_a_while(detached):
    model, moved, _ = detached
    bare, weights = external.without_detached(moved)
    assert list(weights) == ["w"]
    assert [i.name for i in bare.graph.input] == ["x", "w"]
    onnx.checker.check_model(bare, full_check=True)
    restored = external.with_detached(bare, weights)
    assert [i.name for i in restored.graph.input] == ["x"]
    assert external.attached(restored).graph.node == model.graph.node
    assert {t.name: t for t in external.attached(restored).graph.initializer} == {
        t.name: t for t in model.graph.initializer
    }
    assert external.without_detached(model) == (model, {})
    del restored.graph.node[:]
    assert not places(external.with_detached(external.without_detached(restored)[0], weights))


def test_models_are_the_same_wherever_their_values_are(detached, tmp_path):
    model, moved, _ = detached
    other = tmp_path / "other"
    other.mkdir()
    assert same(moved, Shelf(lambda: other).detached(model))
    assert same(model, model)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    changed.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(numpy_helper.to_array(model.graph.initializer[0]) + 1, "w")
    )
    assert not same(moved, Shelf(lambda: other).detached(changed))
    changed.CopyFrom(moved)
    changed.graph.node[1].op_type = "Relu"
    assert not same(moved, changed)


def test_a_detached_and_an_attached_model_are_the_same(detached):
    model, moved, _ = detached
    assert same(moved, model)
    assert same(model, moved)


@pytest.mark.parametrize("level", ["none", "basic", "all"])
def test_sessions_load_detached_weights(detached, level):
    model, moved, feeds = detached
    (expected,) = RUNTIME.session(model, level).run(feeds)
    (found,) = RUNTIME.session(moved, level).run(feeds)
    np.testing.assert_array_equal(found, expected)
    optimized = RUNTIME.optimized(moved, level)
    assert places(optimized) == places(moved)
    np.testing.assert_array_equal(RUNTIME.session(optimized, "none").run(feeds)[0], expected)


def test_weights_in_several_folders(detached, tmp_path):
    model, moved, feeds = detached
    other = tmp_path / "other" / "folder"
    other.mkdir(parents=True)
    extra = numpy_helper.to_array(model.graph.initializer[2])
    Shelf(lambda: other).put(moved.graph.initializer[2], extra)
    assert len(places(moved)) == 2
    np.testing.assert_array_equal(RUNTIME.session(moved).run(feeds)[0], RUNTIME.session(model).run(feeds)[0])


def test_adjoints_read_a_detached_weight_where_it_is(detached):
    model, moved, feeds = detached
    results = []
    for each in (model, moved):
        reverse = reverse_model(each, ["x"], ["y"], [], feeds=feeds, runtime=RUNTIME)
        seeds = {name: np.ones((2, 3, 4), np.float32) for name in reverse.seeds.values()}
        session = RUNTIME.session(reverse.model)
        (adjoint,) = session.run({**feeds, **seeds}, [reverse.adjoints["x"]])
        results.append((adjoint, reverse.model))
    (expected, _), (found, graph) = results
    assert found.shape == expected.shape == (2, 3, 128)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert places(graph) == places(moved)
    assert sum(len(t.raw_data) for t in graph.graph.initializer) < LARGE


def test_an_edit_reads_no_detached_values(detached, monkeypatch):
    _, moved, _ = detached

    def read(where):
        raise AssertionError(where)

    def soften(graph):
        (node,) = (n for n in graph.nodes if n.op == "Tanh")
        node.op = "Sigmoid"

    monkeypatch.setattr(external, "bytes_at", read)
    edited = surgeon.edit(moved, soften)
    assert [n.op_type for n in edited.graph.node] == ["MatMul", "Sigmoid", "Add", "MatMul"]
    assert places(edited) == places(moved)


def test_normalization_moves_no_bytes_of_float32_weights(detached, shelf, monkeypatch):
    _, moved, feeds = detached
    normal = read_normalized(moved, shelf)[1]
    assert places(normal)["w"] == places(moved)["w"]
    np.testing.assert_array_equal(RUNTIME.session(normal).run(feeds)[0], RUNTIME.session(moved).run(feeds)[0])

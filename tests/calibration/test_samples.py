"""Samples by index: batches, splits, digests; and specs of a model's inputs."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, parser

from rdoq_onnx.calibration.samples import Samples, input_specs
from rdoq_onnx.errors import ModelError
from tests.calibration.test_load import X, every, floats, spec


def test_input_specs():
    model = parser.parse_model(
        '<ir_version: 3, opset_import: ["": 13]> g (float[N,3] x, int64 n, float[3] w) => (float[N,3] y) '
        "<float[3] w = {1, 2, 3}> { y = Add(x, w) }"
    )
    assert input_specs(model) == (X, spec("n", dtype="int64"))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    assert input_specs(model)[0] == X


@pytest.mark.parametrize(
    "value",
    [
        helper.make_tensor_sequence_value_info("odd", TensorProto.FLOAT, [3]),
        helper.make_tensor_value_info("odd", TensorProto.FLOAT, None),
        helper.make_tensor_value_info("odd", TensorProto.STRING, [3]),
        helper.make_tensor_value_info("odd", TensorProto.FLOAT8E4M3FN, [3]),
    ],
)
def test_input_specs_refuses(value):
    model = helper.make_model(helper.make_graph([], "g", [value], []))
    with pytest.raises(ModelError, match="'odd'"):
        input_specs(model)


def test_samples():
    samples = Samples("arrays", {"x": floats(10, 3)}, {"c": floats(2)})
    assert len(samples) == 10
    batches = list(samples.batches(4))
    assert [len(b["x"]) for b in batches] == [4, 4, 2]
    assert all(b["c"] is samples.constants["c"] for b in batches)
    np.testing.assert_array_equal(np.concatenate([b["x"] for b in batches]), samples.arrays["x"])
    assert [n for n, _ in samples.counted_batches(4)] == [4, 4, 2]
    np.testing.assert_array_equal(every(samples.take([3, 1]))["x"], samples.arrays["x"][[3, 1]])
    assert len(Samples("arrays", {})) == 0


@pytest.mark.parametrize(
    ("count", "fraction", "sizes"),
    [
        (9, 2 / 3, (6, 3)),
        (2, 0.99, (1, 1)),
        (2, 0, (1, 1)),
        (50, 1, (49, 1)),
        (1, 0.5, (1, 0)),
    ],
)
def test_split(count, fraction, sizes):
    samples = Samples("arrays", {"x": np.arange(count)})
    parts = samples.split(fraction, 1)
    assert tuple(map(len, parts)) == sizes
    rows = [every(part)["x"] for part in parts]
    assert all((np.diff(r) > 0).all() for r in rows)
    assert sorted(np.concatenate(rows)) == list(range(count))
    again = samples.split(fraction, 1)
    assert [p.digest for p in again] == [p.digest for p in parts]


def test_split_depends_on_the_seed():
    samples = Samples("arrays", {"x": np.arange(50)})
    assert samples.split(0.5, 1)[0].digest != samples.split(0.5, 2)[0].digest


def test_loaded_up_to_the_limit():
    x = np.arange(24, dtype=np.float32).reshape(12, 2)
    samples = Samples("arrays", {"x": x}, {"c": floats(2)}, batch=2).take([5, 1, 4, 0])
    held = samples.loaded(4 * 8)
    assert held.picked is None
    assert [f["x"].tolist() for f in held.batches(1)] == [f["x"].tolist() for f in samples.batches(1)]
    assert samples.loaded(4 * 8 - 1) is samples


def test_digest():
    x = floats(4, 3)
    base = Samples("a", {"x": x, "y": x}).digest
    assert len(base) == 64
    assert Samples("b", {"y": x.copy(), "x": np.asfortranarray(x)}).digest == base
    others = [
        {"x": x, "z": x},
        {"x": x.reshape(3, 4), "y": x[:3]},
        {"x": x, "y": x.view(np.int32)},
        {"x": x, "y": x + 1},
    ]
    assert len({base, *(Samples("a", o).digest for o in others)}) == 5


@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 5))
def test_some_are_evenly_spaced_and_whole_batches(count, most, batch):
    samples = Samples("arrays", {"x": np.arange(count * batch)}, batch=batch)
    found = every(samples.some(most))["x"]
    assert len(found) <= max(most, batch)
    assert (found.reshape(-1, batch) == found[::batch, None] + np.arange(batch)).all()
    steps = np.diff(found[::batch] // batch)
    assert len(steps) == 0 or steps.max() - steps.min() <= 1
    assert samples.some(count * batch) is samples


def test_inseparable_rows_are_one_sample():
    joined = Samples("arrays", {"x": np.arange(7)}, batch=3).inseparable()
    assert (len(joined), joined.rows, joined.batch) == (2, 3, 1)
    assert joined.feeds([1])["x"].tolist() == [3, 4, 5]
    assert every(joined.take([1]))["x"].tolist() == [3, 4, 5]


@pytest.fixture
def lengths():
    """Seven samples: four of length 1, three of length 2."""
    short, long = np.arange(4).reshape(4, 1), np.arange(10, 16).reshape(3, 2)
    return Samples("feeds", {"x": short}, {"c": floats(2)}, others=({"x": long},))


def test_no_batch_mixes_shapes(lengths):
    assert len(lengths) == 7
    found = [(n, f["x"].tolist()) for n, f in lengths.counted_batches(3)]
    assert found == [(3, [[0], [1], [2]]), (1, [[3]]), (3, [[10, 11], [12, 13], [14, 15]])]
    assert [f["x"].tolist() for f in lengths.take([5, 0]).batches(2)] == [[[0]], [[12, 13]]]
    with pytest.raises(ValueError, match="different shapes"):
        lengths.feeds([0, 4])


def test_parts_of_samples_of_several_shapes(lengths):
    assert [len(part) for part in lengths.by_shape()] == [4, 3]
    assert every(lengths.by_shape()[1])["x"].tolist() == [[10, 11], [12, 13], [14, 15]]
    assert lengths.feeds([lengths.largest])["x"].tolist() == [[10, 11]]
    parts = lengths.split(0.5, 1)
    rows = [row for part in parts for f in part.batches(9) for row in f["x"][:, 0].tolist()]
    assert sorted(rows) == [0, 1, 2, 3, 10, 12, 14]
    assert [len(part) for part in lengths.some(3).by_shape()] == [2, 1]


def test_the_most_common_shapes_and_of_equal_ones_evenly_spaced():
    arrays = [{"x": np.full((count, size), size)} for size, count in ((1, 1), (2, 3), (3, 1), (4, 1), (5, 1))]
    samples = Samples("feeds", arrays[0], others=tuple(arrays[1:]))
    found = [every(part)["x"].shape for part in samples.of_common_shapes(3).by_shape()]
    assert found == [(1, 1), (3, 2), (1, 5)]
    assert samples.of_common_shapes(5) is samples


def test_samples_of_several_shapes_in_memory_and_their_digest(lengths):
    few = lengths.take([1, 5, 6])
    held = few.loaded(8 * (1 + 2 * 2))
    assert held.picked is None
    assert held.digest == few.digest != lengths.take([1, 4, 6]).digest
    assert [f["x"].tolist() for f in held.batches(2)] == [f["x"].tolist() for f in few.batches(2)]
    assert few.loaded(8 * 5 - 1) is few


def test_joined_samples_follow_each_other():
    first = Samples("test", {"x": np.arange(5)[:, None]}, labels=np.arange(5)).take([1, 3])
    second = Samples("test", {"x": np.arange(10, 14)[:, None]}).take([2, 0])
    both = first.joined(second)
    assert len(both) == 4
    assert [int(feeds["x"][0, 0]) for feeds in both.batches(1)] == [1, 3, 12, 10]
    assert both.classes is None
    assert both.take([0, 3]).digest == first.take([0]).joined(second.take([1])).digest


def test_a_fixed_batch_of_several_shapes():
    samples = Samples("feeds", {"x": np.zeros((4, 1))}, batch=2, others=({"x": np.ones((2, 3))},))
    assert [f["x"].shape for f in samples.batches(1)] == [(2, 1), (2, 1), (2, 3)]
    joined = samples.inseparable()
    assert [(n, f["x"].shape) for n, f in joined.counted_batches(5)] == [(1, (2, 1)), (1, (2, 1)), (1, (2, 3))]


def test_classes_follow_their_samples(lengths):
    assert lengths.classes is None
    labelled = replace(lengths, labels=np.arange(7))
    taken = labelled.take([6, 2, 0, 5])
    assert taken.classes.tolist() == [2, 0, 6, 5]
    assert taken.loaded(1 << 20).classes.tolist() == [2, 0, 6, 5]
    assert [part.classes.tolist() for part in taken.by_shape()] == [[2, 0], [6, 5]]
    assert replace(labelled, rows=7).classes is None

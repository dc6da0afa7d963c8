"""Parts read out of outputs: just the elements that each of them fills, whatever moves them there."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.observation.distortion import Metric
from rdoq_onnx.observation.part_values import PartReader
from rdoq_onnx.observation.parts import Part, Piece, find_parts, measured_tensors
from rdoq_onnx.system.runtime import Runtime

RUNTIME = Runtime("cpu", 1)
SIZES = (3, 5)  # of axis 0, in turn: masks are made for each


def reader_of(net):
    parts = find_parts(net)
    tensors = measured_tensors(parts)
    return PartReader(net, Metric(parts, (1.0,) * len(tensors), (1,) * len(tensors), 1.0), RUNTIME)


def model(nodes, signature):
    found = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {signature} {{ {nodes} }}')
    constants = {
        "w": np.arange(16, dtype=np.float32).reshape(4, 4),
        "v": np.ones((4, 2), np.float32),
        "k": np.float32(3),
        "two": np.array([2]),
        "sizes": np.array([4, 2]),
    }
    found.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items())
    return found


def test_joined_tensors_are_found_behind_what_moves_and_scales_them(ort_run):
    net = model(
        """a = MatMul (x, w) b = MatMul (x, v) s = Mul (a, k) j = Concat <axis = 1> (s, x, b)
        t = Transpose <perm = [1, 0]> (j) u = Transpose <perm = [1, 0]> (t) y = Add (u, k)""",
        "(float[N, 4] x) => (float[N, 10] y)",
    )
    reader = reader_of(net)
    assert reader.outputs == ["y"]
    for count in SIZES:
        x = np.random.default_rng(count).standard_normal((count, 4)).astype(np.float32)
        (y,) = ort_run(net, {"x": x})
        (first,), (second,) = reader.read({"y": y}, {"x": x}, count)
        np.testing.assert_array_equal(first, y[:, :4])
        np.testing.assert_array_equal(second, y[:, 8:])


def test_a_part_of_a_split_output_is_read_from_its_side(ort_run):
    net = model(
        """a = MatMul (x, w) b = MatMul (x, v) j = Concat <axis = 1> (b, a) y, z = Split <axis = 1> (j, sizes)""",
        "(float[N, 4] x) => (float[N, 4] y, float[N, 2] z)",
    )
    x = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    y, z = ort_run(net, {"x": x})
    found = dict(
        zip(
            (p.name for p in find_parts(net)),
            reader_of(net).read({"y": y, "z": z}, {"x": x}, 6),
            strict=True,
        )
    )
    np.testing.assert_array_equal(found["b"][0], y[:, :2])
    np.testing.assert_array_equal(found["a"][0], y[:, 2:])


@pytest.mark.parametrize("count", SIZES)
def test_what_is_selected_from_is_read_in_front(count, ort_run):
    net = model("s = MatMul (x, w) y, i = TopK (s, two)", "(float[N, 4] x) => (float[N, 2] y, int64[N, 2] i)")
    reader = reader_of(net)
    assert reader.outputs == ["s"]
    values = np.arange(4 * count, dtype=np.float32).reshape(count, 4)
    np.testing.assert_array_equal(reader.read({"s": values}, {}, count)[0][0], values)


def test_powers_are_of_each_part_and_caches_share_one():
    one, two, three = (Piece(n, n, n, "whole") for n in ("a", "b", "c"))
    parts = (Part("a", (one,)), Part("caches", (two, three)))
    reader = PartReader(
        model("a = Neg (x)", "(float[N, 4] x) => (float[N, 4] a)"),
        Metric(parts, (1.0, 0.5, 2.0), (1, 1, 1), 1.0),
        RUNTIME,
    )
    a, b, c = (np.full((3, 2), v) for v in (1.0, 2.0, 0.5))
    powers = reader.powers([[a], [b, c]], [[a + 0.1], [b, c + 0.5]])
    np.testing.assert_allclose(powers.signal, [[2.0, 4.0]] * 3)
    np.testing.assert_allclose(powers.noise, [[0.02, 2.0]] * 3)
    np.testing.assert_allclose(powers.sqnr_db, [20.0, 10 * np.log10(2)])
    assert powers.worst == 1

"""Shapes hidden from OpenVINO, which otherwise takes them in front of the bias of a quantized convolution."""

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.opaque_shapes import OpaqueShapes
from rdoq_onnx.system import openvino_runtime
from tests.conftest import deviation

# What follows the quantized convolution `d` [N, 6, 3, 3] of `x`, the output's shape, and how many shapes are hidden.
ENDS = {
    "class token": (
        """a = Shape (x) n = Slice (a, zero, one) s = Concat <axis = 0> (n, one, six) e = Expand (token, s)
           r = Reshape (d, rows) t = Transpose <perm = [0, 2, 1]> (r) y = Concat <axis = 1> (e, t)""",
        "N, 10, 6",
        1,
    ),
    "size of a resized map": (
        """p = MaxPool <kernel_shape = [3, 3]> (d) a = Shape (d) y = Resize <mode = "nearest"> (p, , , a)""",
        "N, 6, 3, 3",
        1,
    ),
    "rows of pixels": (
        """p = Transpose <perm = [0, 2, 3, 1]> (d) a = Shape (d) n = Gather (a, zero) h = Gather (a, two)
           k = Mul (n, h) s = Concat <axis = 0> (k, three, six) y = Reshape (p, s)""",
        "rows, 3, 6",
        1,
    ),
    "flatten": (
        """a = Shape (d) n0 = Gather <axis = 0> (a, first) n = Unsqueeze (n0, zero)
           s = Concat <axis = 0> (n, rest) y = Reshape (d, s)""",
        "N, 54",
        0,
    ),
    "no shape": ("r = Flatten (d) y = Relu (r)", "N, 54", 0),
}


def network(end: str, shape: str, bias: str = ", b") -> onnx.ModelProto:
    model = parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 1, 12, 12] x) => (float[{shape}] y)
        <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] three = {{3}},
         int64[1] six = {{6}}, int64 first = {{0}}, int64[1] rest = {{-1}}, int64[3] rows = {{0, 6, -1}},
         float step = {{0.03}}, uint8 middle = {{120}}>
        {{ w = DequantizeLinear <axis = 0> (wq, ws, wz) c = Conv <strides = [4, 4]> (x, w{bias})
           q = QuantizeLinear (c, step, middle) d = DequantizeLinear (q, step, middle) {end} }}"""
    )
    rng = np.random.default_rng(0)
    values = {
        "wq": rng.integers(-64, 65, (6, 1, 4, 4)).astype(np.int8),
        "ws": rng.uniform(0.002, 0.01, 6).astype(np.float32),
        "wz": np.zeros(6, np.int8),
        "b": rng.standard_normal(6, np.float32),
        "token": rng.standard_normal((1, 1, 6), np.float32),
    }
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in values.items())
    return model


def operators(model: onnx.ModelProto) -> Counter:
    return Counter(n.op_type for n in model.graph.node)


@pytest.mark.parametrize("name", ENDS)
def test_shapes_are_hidden_and_runtimes_agree(ort_run, name):
    end, shape, hidden = ENDS[name]
    model = network(end, shape)
    changed = run_passes([OpaqueShapes()], model)
    assert operators(changed) - operators(model) == Counter({"Mul": hidden} if hidden else {})
    feeds = {"x": np.random.default_rng(1).standard_normal((2, 1, 12, 12), np.float32)}
    expected = ort_run(model, feeds, "none")
    np.testing.assert_array_equal(ort_run(changed, feeds, "all")[0].shape, expected[0].shape)
    assert deviation(ort_run(changed, feeds, "none"), expected) == 0
    if openvino_runtime.installed():
        assert deviation(list(openvino_runtime.load(changed).run(feeds).values()), expected) < 1e-5


def test_nothing_to_hide_without_a_bias():
    model = network(*ENDS["class token"][:2], bias="")
    assert operators(run_passes([OpaqueShapes()], model)) == operators(model)

"""Unfolding against ONNX Runtime, for every operator and attribute."""

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from rdoq_onnx.model.linear import Linear

CONVS = [
    ({}, (6, 4, 3, 3), (2, 4, 7, 8)),
    ({"pads": [1, 2, 0, 1], "strides": [2, 1]}, (6, 4, 3, 3), (2, 4, 7, 8)),
    ({"dilations": [2, 1], "pads": [1, 1, 1, 1]}, (6, 4, 3, 2), (2, 4, 9, 8)),
    ({"group": 2, "pads": [1, 1, 1, 1]}, (6, 2, 3, 3), (2, 4, 7, 8)),
    ({"group": 4}, (4, 1, 3, 3), (3, 4, 7, 8)),
    ({"auto_pad": "SAME_UPPER", "strides": [2, 3]}, (6, 4, 4, 3), (2, 4, 7, 8)),
    ({"auto_pad": "SAME_LOWER"}, (6, 4, 2, 3), (2, 4, 7, 8)),
    ({"auto_pad": "VALID"}, (6, 4, 2, 3), (2, 4, 7, 8)),
    ({"pads": [2, 0]}, (5, 3, 4), (2, 3, 11)),
    ({"strides": [2, 1, 1]}, (5, 3, 2, 2, 2), (2, 3, 5, 4, 6)),
]
TRANSPOSED = [
    ({}, (4, 3, 3, 3), (2, 4, 5, 6)),
    ({"strides": [2, 3], "pads": [1, 0, 2, 1]}, (4, 3, 3, 4), (2, 4, 5, 6)),
    ({"strides": [2, 2], "output_padding": [1, 0], "dilations": [1, 2]}, (4, 3, 3, 3), (2, 4, 5, 6)),
    ({"group": 2, "strides": [2, 2]}, (4, 3, 2, 2), (2, 4, 5, 6)),
    ({"auto_pad": "SAME_UPPER", "strides": [2, 2]}, (4, 3, 3, 3), (2, 4, 5, 6)),
    ({"pads": [3, 3]}, (4, 3, 3), (2, 4, 8)),
    ({"output_shape": [8], "strides": [2]}, (4, 3, 3), (2, 4, 4)),
    ({"output_shape": [8, 9], "strides": [2, 2], "auto_pad": "SAME_UPPER"}, (4, 3, 3, 3), (2, 4, 4, 4)),
    ({"output_shape": [10], "strides": [2]}, (4, 3, 3), (2, 4, 4)),
]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def run(op_type, attributes, weight, x, side=1):
    names = ["x", "w"] if side else ["w", "x"]
    graph = helper.make_graph(
        [helper.make_node(op_type, names, ["z"], **attributes)],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, weight.shape),
        ],
        [helper.make_empty_tensor_value_info("z")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x, "w": weight})[0]


def agree(linear, attributes, weight, x, samples, side=1):
    z = run(linear.op_type, attributes, weight, x, side)
    blocks = linear.grouped(linear.rows(weight)) @ linear.unfold(x, samples)
    np.testing.assert_allclose(linear.outputs(z, samples), blocks, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(linear.refold(blocks, z.shape), z, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(linear.tensor(linear.rows(weight)), weight)
    np.testing.assert_array_equal(linear.ungrouped(linear.grouped(linear.rows(weight))), linear.rows(weight))


@pytest.mark.parametrize(("op_type", "case"), [("Conv", c) for c in CONVS] + [("ConvTranspose", c) for c in TRANSPOSED])
def test_convolutions(rng, op_type, case):
    attributes, shape, data = case
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in attributes.items()}
    weight, x = rng.standard_normal(shape, np.float32), rng.standard_normal(data, np.float32)
    agree(Linear(op_type, shape, **fields), attributes, weight, x, data[0])


@pytest.mark.parametrize(("trans_a", "trans_b", "alpha"), [(0, 0, 1.0), (0, 1, 0.5), (1, 0, 2.0), (1, 1, 1.0)])
def test_gemm(rng, trans_a, trans_b, alpha):
    shape = (6, 5) if trans_b else (5, 6)
    x = rng.standard_normal((5, 4) if trans_a else (4, 5), np.float32)
    linear = Linear("Gemm", shape, trans_a=bool(trans_a), trans_b=bool(trans_b), alpha=alpha)
    attributes = {"transA": trans_a, "transB": trans_b, "alpha": alpha}
    agree(linear, attributes, rng.standard_normal(shape, np.float32), x, 1 if trans_a else 4)


@pytest.mark.parametrize("data", [(4, 5), (4, 3, 5), (2, 3, 7, 5)])
def test_matmul(rng, data):
    weight, x = rng.standard_normal((5, 6), np.float32), rng.standard_normal(data, np.float32)
    agree(Linear("MatMul", (5, 6)), {}, weight, x, data[0])


@pytest.mark.parametrize("data", [(4, 5, 3), (2, 3, 5, 7)])
def test_matmul_with_the_weight_on_the_left(rng, data):
    weight, x = rng.standard_normal((6, 5), np.float32), rng.standard_normal(data, np.float32)
    agree(Linear("MatMul", (6, 5), weight_side=0), {}, weight, x, data[0], side=0)


def test_several_rows_of_axis_0_per_sample(rng):
    weight, x = rng.standard_normal((6, 4, 3, 3), np.float32), rng.standard_normal((6, 4, 7, 8), np.float32)
    agree(Linear("Conv", (6, 4, 3, 3)), {}, weight, x, 2)

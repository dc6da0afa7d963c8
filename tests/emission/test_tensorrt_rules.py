"""A model that obeys all rules, and one that breaks each rule: only that rule is reported, at the right node."""

import numpy as np
import pytest
from onnx import TensorProto, checker, helper, numpy_helper, parser

from rdoq_onnx.emission.tensorrt_rules import violations
from rdoq_onnx.system.io import read_model
from tests.conftest import ROOT

NODES = """
    xq = QuantizeLinear (x, xs, z) xd = DequantizeLinear (xq, xs, z)
    w1d = DequantizeLinear <axis = 0> (w1, w1s, w1z) c1 = Conv (xd, w1d, b1) r = Relu (c1)
    rq = QuantizeLinear (r, rs, z) rd = DequantizeLinear (rq, rs, z) m = MaxPool <kernel_shape = [2, 2]> (rd)
    w2d = DequantizeLinear (w2, w2s, w2z) t = ConvTranspose (m, w2d) f = Flatten (t)
    fq = QuantizeLinear (f, fs, z) fd = DequantizeLinear (fq, fs, z)
    w3d = DequantizeLinear <axis = 0> (w3, w3s, w3z) g = Gemm <transB = 1> (fd, w3d, b3)
    gq = QuantizeLinear (g, gs, z) gd = DequantizeLinear (gq, gs, z)
    w4d = DequantizeLinear <axis = 1> (w4, w4s, w4z) y = MatMul (gd, w4d)
"""
WEIGHTS = {"w1": (4, 3, 1, 1), "w2": (4, 2, 2, 2), "w3": (6, 18), "w4": (6, 5)}
CHANNELS = {"w1": (4,), "w2": (), "w3": (6,), "w4": (5,)}


def stored():
    rng = np.random.default_rng(0)
    values = {"z": np.int8(0), "b1": np.ones(4, np.float32), "b3": np.ones(6, np.float32)}
    values |= {name: np.float32(0.1) for name in ("xs", "rs", "fs", "gs")}
    for name, shape in WEIGHTS.items():
        values[name] = rng.integers(-127, 128, shape, np.int8)
        values[f"{name}s"] = np.full(CHANNELS[name], 0.01, np.float32)
        values[f"{name}z"] = np.zeros(CHANNELS[name], np.int8)
    return values


def build(nodes=NODES, opset=21, **changed):
    """Build the model with other nodes, or other stored values: arrays or TensorProtos by name, None to remove."""
    source = f'<ir_version: 10, opset_import: ["": {opset}]> g (float[2, 3, 4, 4] x) => (float[2, 5] y) {{{nodes}}}'
    model = parser.parse_model(source)
    used = {i for n in model.graph.node for i in n.input}
    for name, value in (stored() | changed).items():
        if name in used and value is not None:
            is_proto = isinstance(value, TensorProto)
            model.graph.initializer.append(value if is_proto else numpy_helper.from_array(np.asarray(value), name))
    checker.check_model(model)
    return model


def edited(old, new, **changed):
    assert old in NODES
    return build(NODES.replace(old, new), **changed)


def int4(name, shape):
    return helper.make_tensor(name, TensorProto.INT4, shape, np.zeros(shape, np.int8).ravel())


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def zeros(*shape, dtype=np.int8):
    return np.zeros(shape, dtype)


def test_a_valid_file_has_no_violations():
    assert violations(build()) == ()


def test_float_weights_behind_a_quantizer_are_valid():
    quantize = "w1q = QuantizeLinear <axis = 0> (w1, w1s, w1z) w1d = DequantizeLinear <axis = 0> (w1q,"
    assert violations(edited("w1d = DequantizeLinear <axis = 0> (w1,", quantize, w1=ones(4, 3, 1, 1))) == ()


def test_int4_weights_beside_float_data_are_valid():
    nodes = "wd = DequantizeLinear <axis = 1> (w, ws) f = Flatten (x) y = MatMul (f, wd)"
    assert violations(build(nodes, w=int4("w", [48, 5]), ws=ones(5))) == ()


def test_int8_weights_beside_float_data_are_valid():
    nodes = "w1d = DequantizeLinear <axis = 0> (w1, w1s, w1z) f = Conv (x, w1d, b1) y = Flatten (f)"
    assert violations(build(nodes)) == ()


def test_float_models_are_valid():
    assert violations(read_model(ROOT / "models" / "digits_cnn.onnx")) == ()


def test_a_layer_left_in_float_is_valid():
    assert violations(edited("Conv (xd, w1d, b1)", "Conv (xd, wf, b1)", wf=ones(4, 3, 1, 1))) == ()


# Text replaced in the nodes, its replacement, changed stored values, and the start of the first line reported.
BROKEN = {
    "unsigned": ("", "", {"z": np.uint8(0)}, "QuantizeLinear 'xq' outputs UINT8"),
    "no zero point": (
        "(x, xs, z) xd = DequantizeLinear (xq, xs, z)",
        "(x, xs) xd = DequantizeLinear (xq, xs)",
        {},
        "QuantizeLinear 'xq' outputs UINT8",
    ),
    "integers quantized": (
        "xq = QuantizeLinear (x,",
        "i = Cast <to = 6> (x) xq = QuantizeLinear (i,",
        {},
        "QuantizeLinear 'xq' quantizes INT32",
    ),
    "unsigned weight": (
        "",
        "",
        {"w1": ones(4, 3, 1, 1, dtype=np.uint8), "w1z": zeros(4, dtype=np.uint8)},
        "DequantizeLinear 'w1d' decodes UINT8",
    ),
    "activation zero point": ("", "", {"z": np.int8(3)}, "QuantizeLinear 'xq' has a zero point other than 0"),
    "weight zero point": ("", "", {"w1z": np.int8([0, 0, 1, 0])}, "DequantizeLinear 'w1d' has a zero point other than"),
    "computed zero point": (
        "xq =",
        "z = Sub (one, one) xq =",
        {"z": None, "one": np.int8(1)},
        "QuantizeLinear 'xq' has a zero point that is computed",
    ),
    "computed scale": (
        "w1d =",
        "w1s = Cast <to = 1> (h) w1d =",
        {"w1s": None, "h": ones(4, dtype=np.float16)},
        "DequantizeLinear 'w1d' has a scale that is computed",
    ),
    "float16 scale": (
        "(w4, w4s, w4z)",
        "(w4, h, w4z)",
        {"h": ones(5, dtype=np.float16)},
        "DequantizeLinear 'w4d' has a FLOAT16 scale",
    ),
    "negative scale": (
        "",
        "",
        {"w1s": np.float32([1, 1, -1, 1])},
        "DequantizeLinear 'w1d' has a scale that is not positive",
    ),
    "scale of zero": ("", "", {"xs": np.float32(0)}, "QuantizeLinear 'xq' has a scale that is not positive"),
    "infinite scale": ("", "", {"xs": np.float32(np.inf)}, "QuantizeLinear 'xq' has a scale that is not positive"),
    "scales of an activation": (
        "(x, xs, z) xd = DequantizeLinear (xq, xs, z)",
        "(x, cs, cz) xd = DequantizeLinear (xq, cs, cz)",
        {"cs": ones(3), "cz": zeros(3)},
        "QuantizeLinear 'xq' has per-channel scales for an activation",
    ),
    "axis of Conv": (
        "axis = 0> (w1,",
        "axis = 1> (w1,",
        {"w1s": ones(3), "w1z": zeros(3)},
        "DequantizeLinear 'w1d' has scales along axis 1 of the weight of Conv; scale along axis 0",
    ),
    "axis of ConvTranspose": (
        "",
        "",
        {"w2s": ones(2), "w2z": zeros(2)},
        "DequantizeLinear 'w2d' has scales along axis 1 of the weight of ConvTranspose; use one scale",
    ),
    "axis of Gemm": (
        "axis = 0> (w3,",
        "axis = 1> (w3,",
        {"w3s": ones(18), "w3z": zeros(18)},
        "DequantizeLinear 'w3d' has scales along axis 1 of the weight of Gemm; scale along axis 0",
    ),
    "axis of MatMul": (
        "axis = 1> (w4,",
        "axis = -2> (w4,",
        {"w4s": ones(6), "w4z": zeros(6)},
        "DequantizeLinear 'w4d' has scales along axis 0 of the weight of MatMul; scale along axis 1",
    ),
    "number of scales": (
        "",
        "",
        {"w1s": ones(3), "w1z": zeros(3)},
        "DequantizeLinear 'w1d' has 3 scales for 4 channels",
    ),
    "operator on integers": (
        "rd = DequantizeLinear (rq,",
        "k = Clip (rq, low, high) rd = DequantizeLinear (k,",
        {"low": np.int8(-8), "high": np.int8(7)},
        "QuantizeLinear 'rq' is read by Clip",
    ),
    "decoded weight": (
        "w1d = DequantizeLinear <axis = 0> (w1,",
        "k = Cast <to = 3> (w1) w1d = DequantizeLinear <axis = 0> (k,",
        {"w1": int4("w1", [4, 3, 1, 1])},
        "DequantizeLinear 'w1d' decodes weights computed by Cast",
    ),
    "weight moved": (
        "y = MatMul (gd, w4d)",
        "k = Transpose (w4d) y = MatMul (gd, k)",
        {"w4": ones(5, 6, dtype=np.int8), "w4s": ones(6), "w4z": zeros(6)},
        "DequantizeLinear 'w4d' is followed by Transpose",
    ),
    "INT32 bias": (
        "c1 = Conv (xd, w1d, b1)",
        "b = DequantizeLinear <axis = 0> (i, w1s) c1 = Conv (xd, w1d, b)",
        {"i": ones(4, dtype=np.int32)},
        "Conv 'c1' has a bias that is computed by DequantizeLinear",
    ),
    "INT4 beside quantized data": (
        "(w4, w4s, w4z)",
        "(w4, w4s)",
        {"w4": int4("w4", [6, 5])},
        "MatMul 'y' has INT4 weights and quantized data",
    ),
    "float data": ("Conv (xd,", "Conv (x,", {}, "Conv 'c1' has INT8 weights and float data"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_each_broken_rule_is_reported(kind):
    old, new, changed, expected = BROKEN[kind]
    lines = violations(edited(old, new, **changed) if old else build(**changed))
    rule = expected.split("' ")[1]
    assert lines
    assert lines[0].startswith(expected)
    assert all(rule in line and "; " in line for line in lines)


def test_opset():
    assert violations(build(opset=26))[0].startswith("model: opset 26 is outside 9 to 25")


def test_integer_graph_outputs_are_reported():
    model = build()
    model.graph.output.append(helper.make_tensor_value_info("rq", TensorProto.INT8, [2, 4, 4, 4]))
    assert violations(model) == ("QuantizeLinear 'rq' makes a graph output of integers; dequantize it",)


def test_parameters_may_be_constant_nodes():
    assert violations(edited("xq =", "xs = Constant <value = float {0.1}> () xq =", xs=None)) == ()

"""OpenVINO against ONNX Runtime on quantized models, and the weight forms that it folds into integer kernels."""

import numpy as np
import pytest
from onnx import TensorProto, checker, helper, numpy_helper, parser

from rdoq_onnx.errors import ModelError, ProviderError
from rdoq_onnx.system import openvino_runtime
from rdoq_onnx.system.io import read_model
from rdoq_onnx.system.openvino_runtime import load
from tests.conftest import ROOT, deviation

needs_openvino = pytest.mark.skipif(not openvino_runtime.installed(), reason="OpenVINO is not installed")

NODES = """xq = QuantizeLinear (x, xs, xz) xd = DequantizeLinear (xq, xs, xz) {decode}
    wd = DequantizeLinear <axis = 0> (w, ws, wz) c = Conv <pads = [1, 1, 1, 1]> (xd, wd, b)
    yq = QuantizeLinear (c, ys, yz) y = DequantizeLinear (yq, ys, yz)"""
SHAPE = (8, 4, 3, 3)
RNG = np.random.default_rng(0)
WEIGHT = RNG.integers(-8, 8, SHAPE, np.int8)
FEEDS = {"x": RNG.standard_normal((2, 4, 8, 8), np.float32)}


def build(decode="", nodes=NODES, **changed):
    """A quantized convolution; the nodes `decode` produce the INT8 weight w from named initializers."""
    source = f"g (float[2, 4, 8, 8] x) => (float[2, 8, 8, 8] y) {{{nodes.replace('{decode}', decode)}}}"
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> {source}')
    values = {"xs": np.float32(0.02), "xz": np.uint8(128), "ys": np.float32(0.3), "yz": np.uint8(128), "w": WEIGHT}
    values |= {"ws": RNG.uniform(0.05, 0.15, 8).astype(np.float32), "wz": np.zeros(8, np.int8)}
    values |= {"b": RNG.standard_normal(8, np.float32)} | changed
    made = {o for n in model.graph.node for o in n.output}
    for name in {i for n in model.graph.node for i in n.input} & (values.keys() - made):
        value = values[name]
        given = isinstance(value, TensorProto)
        model.graph.initializer.append(value if given else numpy_helper.from_array(np.asarray(value), name))
    checker.check_model(model)
    return model


def int4(name, value):
    return helper.make_tensor(name, TensorProto.INT4, value.shape, value.ravel())


def bits(count):
    """Planes [count, n / 8, 1] of the weight's lowest bits, and the shape of the unpacked."""
    values = (WEIGHT.ravel().astype(int) + 8).astype(np.uint8)
    return np.stack([np.packbits(values >> k & 1) for k in range(count)])[..., None], np.array([count, values.size])


PLANES, UNPACKED = bits(4)
SPREAD = "i = Cast <to = 6> (p) d = Div (i, powers) m = Mod (d, two) r = Reshape (m, unpacked) t = Mul (r, weights)"
FOLDED = {
    "INT8": ("", {}),
    "INT4 cast to INT8": ("w = Cast <to = 3> (w4)", {"w4": int4("w4", WEIGHT)}),
    "parts joined and put in order": (
        "k = Cast <to = 3> (part) j = Concat <axis = 0> (k, rest) w = Gather <axis = 0> (j, order)",
        {"part": int4("part", WEIGHT[:5]), "rest": WEIGHT[5:], "order": np.arange(8)[::-1]},
    ),
    "bit planes by integer arithmetic": (
        f"{SPREAD} s = ReduceSum <keepdims = 0> (t, first) o = Sub (s, eight) c8 = Cast <to = 3> (o) "
        "w = Reshape (c8, shape)",
        {
            "p": PLANES,
            "powers": 2 ** np.arange(7, -1, -1, np.int32),
            "two": np.int32(2),
            "unpacked": UNPACKED,
            "weights": 2 ** np.arange(4, dtype=np.int32)[:, None],
            "first": np.array([0]),
            "eight": np.int32(8),
            "shape": np.array(SHAPE),
        },
    ),
    "float16 scales": ("ws = Cast <to = 1> (h)", {"h": RNG.uniform(0.05, 0.15, 8).astype(np.float16)}),
    "INT32 bias, its scale computed": (
        "bs = Mul (ws, xs) b = DequantizeLinear <axis = 0> (bq, bs)",
        {"bq": RNG.integers(-999, 999, 8, np.int32)},
    ),
}


@needs_openvino
@pytest.mark.parametrize("form", FOLDED)
def test_forms_that_fold_to_integer_kernels(ort_run, form):
    decode, values = FOLDED[form]
    model = build(decode, **values)
    loaded = load(model, threads=1)
    assert deviation(list(loaded.run(FEEDS).values()), ort_run(model, FEEDS, "none")) < 1e-6
    assert loaded.kernels()["Convolution u8"] == 1
    # Scale and round, the convolution, scale and round, and layout changes: no decoding per inference.
    assert sum(loaded.kernels().values()) <= 6


@needs_openvino
def test_bit_operators_do_not_fold(ort_run):
    """Why files for OpenVINO contain no bit operators: correct, but decoded at each inference for a float kernel."""
    decode = "k = BitwiseAnd (packed, mask) j = Cast <to = 3> (k) w = Sub (j, eight)"
    packed = (WEIGHT.astype(int) + 8).astype(np.uint8)
    model = build(decode, packed=packed, mask=np.uint8(15), eight=np.int8(8))
    loaded = load(model, threads=1)
    assert deviation(list(loaded.run(FEEDS).values()), ort_run(model, FEEDS, "none")) < 1e-6
    assert loaded.kernels()["Convolution f32"] == 1


@needs_openvino
def test_activations_under_8_bits(ort_run):
    """A ceiling on the integers between Q and DQ keeps the integer convolution."""
    clipped = NODES.replace("xd = DequantizeLinear (xq,", "k = Clip (xq, low, high) xd = DequantizeLinear (k,")
    model = build(nodes=clipped, low=np.uint8(120), high=np.uint8(135))
    loaded = load(model, threads=1)
    assert deviation(list(loaded.run(FEEDS).values()), ort_run(model, FEEDS, "none")) < 1e-6
    assert loaded.kernels()["Convolution u8"] == 1


@needs_openvino
def test_outputs_by_name(ort_run):
    model = build(nodes=NODES.replace("yq =", "z = Relu (c) yq ="))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 8, 8, 8]))
    found = load(model).run(FEEDS)
    y, z = ort_run(model, FEEDS, "none")
    assert list(found) == ["y", "z"]
    assert deviation([found["z"], found["y"]], [z, y]) < 1e-6


@needs_openvino
def test_real_model(ort_run):
    model = read_model(ROOT / "models" / "digits_cnn.onnx")
    name = model.graph.input[0].name
    with np.load(ROOT / "models" / "digits_test.npz") as data:
        pixels = (data["x"][:16].astype(np.float32) / 255 - data["mean"]) / data["std"]
    feeds = {name: np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32)}
    assert deviation(list(load(model, threads=1).run(feeds).values()), ort_run(model, feeds, "none")) < 1e-4


@needs_openvino
def test_refusals():
    unknown = "g (float[2] x) => (float[2] y) { y = d.NoSuch (x) }"
    with pytest.raises(ModelError, match=r"OpenVINO refuses the model: .*NoSuch"):
        load(parser.parse_model(f'<ir_version: 8, opset_import: ["": 17, "d": 1]> {unknown}'))
    loaded = load(build(), threads=1)
    with pytest.raises(ModelError, match=r"could not run the model: .*shape"):
        loaded.run({"x": np.zeros((2, 2, 8, 8), np.float32)})
    with pytest.raises(ModelError, match=r"could not run the model: .*nosuch"):
        loaded.run({"nosuch": FEEDS["x"]})


def test_not_installed(monkeypatch):
    monkeypatch.setattr(openvino_runtime, "openvino", None)
    assert not openvino_runtime.installed()
    with pytest.raises(ProviderError, match="pip install openvino"):
        load(build())


@needs_openvino
def test_a_constant_output_has_a_name_of_its_own():
    text = "g (float[N, 2] x) => (float[N, 2] y, float[2] c) { y = Relu (x) c = Identity (k) }"
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    model.graph.initializer.append(numpy_helper.from_array(np.array([3, 4], np.float32), "k"))
    assert load(model).run({"x": np.ones((1, 2), np.float32)})["c"].tolist() == [3, 4]

"""Every large constant that stays in float is listed with the node that reads it; what decodes weights is not."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

import rdoq_onnx
from rdoq_onnx import pipeline
from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.float_constants import left_by_plan
from rdoq_onnx.analysis.normalization import read_normalized
from rdoq_onnx.config import Config
from rdoq_onnx.system.progress import Progress

CONFIG = Config(activation_bits=None, weight_bits=4, effort="fast", threads=1)
IMPORTS = '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>'
X = "g (float[N, 6, 24] x) => (float[N, 6, 5] y)"
# Body before the layer `y = MatMul (h, v)`, shapes of constants, and what is listed of the nodes beside it.
BODIES = {
    "einsum": ('{ h = Einsum <equation = "bsd,dk->bsk"> (x, w)', {"w": (24, 16)}, ("Einsum", "weights of Einsum")),
    "fused": (
        """{ h = com.microsoft.FusedConv <activation = "Relu", kernel_shape = [9], pads = [4, 4]> (x, w)""",
        {"w": (6, 6, 9)},
        ("FusedConv", "com.microsoft"),
    ),
    "small": ("{ h = Mul (x, w)", {"w": (6, 24)}, None),
    "wide gate": ("{ k = MatMul (x, u) m = Mul (k, w) h = Relu (m)", {"u": (24, 48), "w": (6, 48)}, ("Mul", "element")),
    "bias": ("{ k = MatMul (x, u) m = Add (k, b) h = Relu (m)", {"u": (24, 256), "b": (256,)}, ("Add", "a vector")),
    "inside": (
        """<bool t = {1}> { h = If (t) <then_branch = one () => (float[N, 6, 24] a) { a = Einsum
        <equation = "bsd,dk->bsk"> (x, w) }, else_branch = two () => (float[N, 6, 24] c) { c = Relu (x) }>""",
        {"w": (24, 24)},
        ("Einsum", "weights of Einsum"),
    ),
}


def model_of(name):
    body, shapes, _ = BODIES[name]
    model = parser.parse_model(f"{IMPORTS} {X} {body} y = MatMul (h, v) }}")
    rng = np.random.default_rng(0)
    width = {"einsum": 16, "wide gate": 48, "bias": 256}.get(name, 24)
    for key, shape in {**shapes, "v": (width, 5)}.items():
        value = rng.standard_normal(shape, np.float32) / 5
        model.graph.initializer.append(numpy_helper.from_array(value, key))
    return model, {"x": rng.standard_normal((24, 6, 24), np.float32)}


@pytest.mark.parametrize("name", BODIES)
def test_what_stays_in_float_is_listed(name):
    model, samples = model_of(name)
    expected = BODIES[name][2]
    result = pipeline.run(model, samples, CONFIG, Progress())
    plan = left_by_plan(analyse(read_normalized(model)[1], CONFIG.selection))
    for skips in (result.report.skipped, plan):
        assert [s.op_type for s in skips] == ([expected[0]] if expected else [])
        assert all(expected[1] in s.reason for s in skips)


@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.parametrize("storage", ["packed", "native", "int8"])
def test_scales_are_not_listed(storage, activation_bits):
    """Neither is a bias in INT32."""
    model = parser.parse_model(f"""{IMPORTS} g (float[N, 8] x) => (float[N, 5] y) {{
        h = Gemm (x, u, b) r = Relu (h) y = MatMul (r, v) }}""")
    rng = np.random.default_rng(0)
    for key, shape in {"u": (8, 300), "b": (300,), "v": (300, 5)}.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape, np.float32), key))
    config = Config(activation_bits=activation_bits, weight_bits=4, effort="fast", storage=storage, threads=1)
    result = pipeline.run(model, {"x": rng.standard_normal((24, 8), np.float32)}, config, Progress())
    assert [s.op_type for s in result.report.skipped] == (["Gemm"] if activation_bits is None else [])


def test_nodes_listed_already_are_not_listed_again():
    model, samples = model_of("bias")
    config = Config(activation_bits=None, weight_bits=4, effort="fast", threads=1, exclude=("u",))
    skipped = pipeline.run(model, samples, config, Progress()).report.skipped
    assert [(s.op_type, s.reason[:8]) for s in skipped] == [("MatMul", "excluded"), ("Add", "a vector")]


def test_scales_of_products_on_packed_weights_are_no_weights():
    model = parser.parse_model(f"{IMPORTS} g (float[N, 6, 32] x) => (float[N, 6, 300] y) {{ y = MatMul (x, w) }}")
    rng = np.random.default_rng(0)
    model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal((32, 300), np.float32), "w"))
    samples = {"x": rng.standard_normal((24, 6, 32), np.float32)}
    result = rdoq_onnx.quantize(model, samples, weights_only=True, bits=4, storage="nbits", effort="fast", threads=1)
    assert "MatMulNBits" in {n.op_type for n in result.model.graph.node}
    assert "MatMulNBits" not in {s.op_type for s in result.report.skipped}

"""float16, bfloat16 and float64 models, and those with functions, quantized like any other."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

import rdoq_onnx
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.normalization.inline_functions import InlineFunctions
from rdoq_onnx.passes.normalization.widen_floats import WidenFloats
from tests.conftest import OrtRun, deviation

HALF = """<ir_version: 8, opset_import: ["": 17]>
    g (float16[N, 8] x, bool c) => (float16[N, 4] y, float16[N, 6] a)
    { a = MatMul (x, w) k = Constant <value = float16[1] {1}> () b = Add (a, k) d = Cast <to = 10> (c)
      r = If (c) < then_branch = g1 () => (float16[N, 6] t) { t = Relu (b) },
                   else_branch = g2 () => (float16[N, 6] e) { e = Mul (b, d) }>
      y = MatMul (r, v) }"""
INSIDE = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 8] x) => (float[N, 4] y)
    { h = Cast <to = 16> (x) a = MatMul (h, w) r = Relu (a) z = MatMul (r, v) y = Cast <to = 1> (z) }"""
FUNCTION = """<ir_version: 8, opset_import: ["": 17, "local": 1]> g (float[N, 8] x) => (float[N, 4] y)
    { a = local.Dense (x, w) y = local.Dense (a, v) }
    <domain: "local", opset_import: ["": 17]> Dense (p, q) => (z) { m = MatMul (p, q) z = Relu (m) }"""


def model(text: str, kind: int) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    parsed = parser.parse_model(text)
    for name, shape in (("w", (8, 6)), ("v", (6, 4))):
        parsed.graph.initializer.append(helper.make_tensor(name, kind, shape, rng.standard_normal(shape).ravel()))
    return parsed


def kinds(graph: onnx.GraphProto) -> set[int]:
    return {t.data_type for t in graph.initializer} | {v.type.tensor_type.elem_type for v in graph.value_info}


def test_a_half_precision_model_computes_the_same_in_float32(ort_run: OrtRun) -> None:
    half = model(HALF, TensorProto.FLOAT16)
    wide = run_passes([WidenFloats()], half)
    assert [v.type.tensor_type.elem_type for v in (*wide.graph.input, *wide.graph.output)] == [10, 9, 10, 10]
    assert kinds(wide.graph) == {TensorProto.FLOAT}
    for c in (True, False):
        feeds = {"x": np.random.default_rng(1).standard_normal((5, 8)).astype(np.float16), "c": np.array(c)}
        assert deviation(ort_run(wide, feeds), ort_run(half, feeds)) < 5e-3


def test_a_double_model_computes_the_same_in_float32(ort_run: OrtRun) -> None:
    double = model(HALF.replace("float16", "double").replace("to = 10", "to = 11"), TensorProto.DOUBLE)
    narrow = run_passes([WidenFloats()], double)
    assert [v.type.tensor_type.elem_type for v in (*narrow.graph.input, *narrow.graph.output)] == [11, 9, 11, 11]
    assert kinds(narrow.graph) == {TensorProto.FLOAT}
    feeds = {"x": np.random.default_rng(1).standard_normal((5, 8)), "c": np.array(False)}
    assert deviation(ort_run(narrow, feeds), ort_run(double, feeds)) < 1e-5


def test_values_beyond_float32_stay_finite() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> g (double[N, 2] x) => (double[N, 2] y)
        { k = Constant <value = double[2] {-1e300, inf}> () y = Add (x, k) }"""
    nodes = run_passes([WidenFloats()], parser.parse_model(text)).graph.node
    (constant,) = [n for n in nodes if n.op_type == "Constant"]
    np.testing.assert_array_equal(numpy_helper.to_array(constant.attribute[0].t), [np.finfo(np.float32).min, np.inf])


@pytest.mark.parametrize("inside", ["", "d = Cast <to = 11> (s) e = Cast <to = 1> (d)"])
def test_a_float32_model_is_left_alone(inside: str) -> None:
    plain = model(FUNCTION.replace("{ a =", f"{{ s = ReduceSum (x) {inside} a ="), TensorProto.FLOAT)
    assert WidenFloats()(plain) is plain


@pytest.mark.parametrize(("kind", "number"), [("double", TensorProto.DOUBLE), ("bfloat16", TensorProto.BFLOAT16)])
def test_inputs_and_outputs_keep_their_types(kind: str, number: int) -> None:
    text = f"""<ir_version: 8, opset_import: ["": 17]> g ({kind}[N, 8] x) => ({kind}[N, 4] y)
        {{ a = MatMul (x, w) r = Relu (a) y = MatMul (r, v) }}"""
    samples = np.random.default_rng(2).standard_normal((24, 8)).astype(np.float32)
    result = rdoq_onnx.quantize(model(text, number), {"x": samples}, effort="fast", threads=1)
    graph = result.model.graph
    assert [v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)] == [number, number]
    assert [x.op for x in result.report.layers] == ["MatMul", "MatMul"]
    assert result.report.sqnr_db > 20


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (INSIDE.replace("16", "10"), TensorProto.FLOAT16),
        (INSIDE, TensorProto.BFLOAT16),
        (FUNCTION, TensorProto.FLOAT),
        (HALF.replace("bool c) =>", "bool[1] c) =>"), TensorProto.FLOAT16),
    ],
)
def test_layers_are_quantized(text: str, kind: int) -> None:
    result = rdoq_onnx.quantize(model(text, kind), effort="fast", samples=16, threads=1)
    assert [x.op for x in result.report.layers] == ["MatMul", "MatMul"]
    assert result.report.sqnr_db > 20


def test_functions_are_inlined_and_weights_stay(ort_run: OrtRun) -> None:
    functions = model(FUNCTION, TensorProto.FLOAT)
    inlined = run_passes([InlineFunctions()], functions)
    assert [n.op_type for n in inlined.graph.node] == ["MatMul", "Relu"] * 2
    assert not inlined.functions
    feeds = {"x": np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32)}
    assert deviation(ort_run(inlined, feeds), ort_run(functions, feeds)) < 1e-6


@pytest.mark.parametrize(("opset", "ir"), [(6, 3), (7, 3), (8, 3), (9, 4), (11, 6), (20, 9), (25, 12), (28, 13)])
def test_opsets(opset: int, ir: int) -> None:
    rng = np.random.default_rng(0)
    weights = {"k": rng.standard_normal((3, 2, 3, 3)), "w": rng.standard_normal((48, 5)), "b": rng.standard_normal(5)}
    tensors = [numpy_helper.from_array(v.astype(np.float32), n) for n, v in weights.items()]
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Flatten", ["r"], ["f"]),
        helper.make_node("Gemm", ["f", "w", "b"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", 1, [1, 2, 4, 4])]
    if ir == 3:  # weights are graph inputs, too
        inputs += [helper.make_tensor_value_info(t.name, 1, t.dims) for t in tensors]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", 1, [1, 5])], tensors)
    built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    result = rdoq_onnx.quantize(built, effort="fast", samples=16, threads=1)
    assert [x.op for x in result.report.layers] == ["Conv", "Gemm"]
    assert result.report.sqnr_db > 15

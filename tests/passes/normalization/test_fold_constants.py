"""Constant folding between an initializer and its layer; other nodes stay."""

import re

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.normalization.fold_constants import FoldConstants
from rdoq_onnx.passes.normalization.normalize import Normalize
from rdoq_onnx.system.io import read_model
from tests.conftest import deviation, feeds_for, real_models


def parse(nodes, outputs="float y", **values):
    graph = f"g (float[5, 4] x) => ({outputs}) {{ {nodes} }}"
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {graph}')
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in values.items())
    return model


def ops(model):
    return [n.op_type for n in model.graph.node]


WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4) - 5
FOLDED = {
    "Transpose": "t = Transpose (w)",
    "Transpose with axes": "t = Transpose <perm = [1, 0]> (w)",
    "Cast": "c = Cast <to = 1> (h) t = Transpose (c)",
    "Reshape": "t = Reshape (w, shape)",
    "Unsqueeze and Squeeze": "u = Unsqueeze (w, first) s = Squeeze (u, first) t = Transpose (s)",
    "Mul": "m = Mul (w, two) t = Transpose (m)",
    "Concat": "a = Transpose (w) t = Concat <axis = 1> (a, a)",
    "weight normalization": "n = ReduceL2 <axes = [1]> (w) d = Div (w, n) m = Mul (g, d) t = Transpose (m)",
    "weight normalization, spelled out": """q = Pow (w, two) s = ReduceSum (q, first) n = Sqrt (s) d = Div (w, n)
        t = Transpose (d)""",
    "weight standardization": """m = ReduceMean <axes = [1]> (w) c = Sub (w, m) q = Mul (c, c)
        v = ReduceMean <axes = [1]> (q) e = Add (v, two) n = Sqrt (e) r = Reciprocal (n) s = Mul (c, r)
        t = Transpose (s)""",
    "weight standardization by a BatchNormalization": """c = Transpose (w) m = ReduceMean <axes = [1], keepdims = 0> (w)
        t = BatchNormalization (c, o, z, m, o)""",
    "weight standardization by a BatchNormalization that trains": """c = Transpose (w)
        t, mean, variance = BatchNormalization <training_mode = 1> (c, o, z, z, o)""",
    "several": "a = Transpose (w) b = Reshape (a, shape) t = Identity (b)",
}
VALUES = {
    "w": WEIGHT,
    "h": WEIGHT.astype(np.float16),
    "shape": np.array([4, 3]),
    "first": np.array([0]),
    "o": np.ones(3, np.float32),
    "z": np.zeros(3, np.float32),
    "g": np.array([[1], [2], [3]], np.float32),
    "two": np.float32(2) * np.ones((), np.float32),
}


@pytest.mark.parametrize("kind", FOLDED)
def test_weight_is_computed(ort_run, kind):
    nodes = f"{FOLDED[kind]} y = MatMul (x, t)"
    model = parse(nodes, **{k: v for k, v in VALUES.items() if re.search(rf"\b{k}\b", nodes)})
    folded = run_passes([FoldConstants()], model)
    assert ops(folded) == ["MatMul"]
    (weight,) = folded.graph.initializer
    assert weight.name == folded.graph.node[0].input[1]
    feeds = {"x": np.random.default_rng(0).standard_normal((5, 4), np.float32)}
    assert deviation(ort_run(folded, feeds), ort_run(model, feeds)) < 1e-6
    assert ops(model)[-1] == "MatMul"
    assert len(ops(model)) > 1


def test_a_computed_weight_shared_by_two_layers_is_stored_once():
    model = parse("t = Transpose (w) y = MatMul (x, t) z = MatMul (x, t)", "float y, float z", w=WEIGHT)
    folded = run_passes([FoldConstants()], model)
    assert ops(folded) == ["MatMul", "MatMul"]
    assert len(folded.graph.initializer) == 1


def test_the_source_stays_for_other_consumers():
    model = parse("t = Transpose (w) y = MatMul (x, t) z = Relu (w)", "float y, float z", w=WEIGHT)
    folded = run_passes([FoldConstants()], model)
    assert ops(folded) == ["MatMul", "Relu"]
    assert len(folded.graph.initializer) == 2


def test_arithmetic_of_shapes():
    body = """s = Shape (w) r = Gather (s, zero) d = Add (r, minus)
        e = ConstantOfShape <value = int64[1] {0}> (one)
        pads = Concat <axis = 0> (d, e, d, nothing) y = Pad (x, pads)"""
    numbers = {"zero": [0], "minus": [1 - WEIGHT.shape[0]], "nothing": [0], "one": [1]}
    model = parse(body, w=WEIGHT, **{k: np.array(v, np.int64) for k, v in numbers.items()})
    folded = run_passes([FoldConstants()], model)
    assert ops(folded) == ["Pad"]
    (pads,) = folded.graph.initializer
    assert numpy_helper.to_array(pads).tolist() == [1, 0, 1, 0]


LARGE = np.ones((9, 9), np.float32)
HUGE = np.array([1 << 40], np.int64)
LEFT_ALONE = {
    "what no layer reads": "t = Transpose (large) y = Mul (x, t)",
    "a tensor that a few numbers blow up": "t = ConstantOfShape (huge) y = Mul (x, t)",
    "an operator that no weight is normalized by": "e = Exp (w) t = Transpose (e) y = MatMul (x, t)",
    "what is computed from the input": "a = Transpose (x) t = Concat <axis = 0> (a, a) y = MatMul (w2, t)",
    "an operator whose other outputs are read": """t, m, v = BatchNormalization <training_mode = 1> (w, o, o, o, o)
        n = Gemm <transB = 1> (x, t) y = Add (n, m)""",
    "operators of others": "t = com.microsoft.Transpose (w) y = MatMul (x, t)",
}


@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_left_alone(kind):
    ones = {"w2": np.ones((2, 8), np.float32), "o": np.ones(4, np.float32)}
    model = parse(LEFT_ALONE[kind], w=WEIGHT, large=LARGE, huge=HUGE, **ones)
    if "com.microsoft" in LEFT_ALONE[kind]:
        model.opset_import.add(domain="com.microsoft", version=1)
    assert ops(FoldConstants()(model)) == ops(model)


def test_a_model_without_foldable_nodes_is_returned_itself():
    model = parse(LEFT_ALONE["what is computed from the input"], w2=np.ones((2, 8), np.float32))
    assert FoldConstants()(model) is model


def test_a_chain_longer_than_python_s_stack(ort_run):
    chain = " ".join(f"t{i + 1} = Transpose (t{i})" for i in range(2001))
    model = parse(f"{chain} y = MatMul (x, t2001)", t0=WEIGHT)
    folded = run_passes([FoldConstants()], model)
    assert ops(folded) == ["MatMul"]
    np.testing.assert_array_equal(numpy_helper.to_array(folded.graph.initializer[0]), WEIGHT.T)


def test_weights_that_would_exhaust_memory():
    """Each Concat doubles its input, each Mul squares it: 2^40 columns are not folded."""
    doubled = " ".join(f"t{i + 1} = Concat <axis = 1> (t{i}, t{i})" for i in range(40))
    model = parse(f"{doubled} y = MatMul (x, t40)", t0=WEIGHT.T)
    assert run_passes([FoldConstants()], model).graph.node[-2:] == model.graph.node[-2:]
    squared = "a = Reshape (w, row) b = Reshape (w, column) t = Mul (a, b) y = MatMul (x, t)"
    model = parse(squared, w=np.ones(400, np.float32), row=np.array([1, -1]), column=np.array([-1, 1]))
    assert ops(run_passes([FoldConstants()], model)) == ["Mul", "MatMul"]


def test_a_weight_that_is_a_graph_output_too():
    model = parse("t = Transpose (w) y = MatMul (x, t)", "float y, float t", w=WEIGHT)
    folded = run_passes([FoldConstants()], model)
    assert ops(folded) == ["Transpose", "MatMul"]
    assert [o.name for o in folded.graph.output] == ["y", "t"]


@pytest.mark.parametrize("path", [p for p in real_models() if p.id in ("models/digits_vit.onnx", "magika/model.onnx")])
def test_real_models_compute_the_same(ort_run, path):
    model = run_passes([Normalize()], read_model(path))
    folded = run_passes([FoldConstants()], model)
    feeds = feeds_for(path, model)
    assert deviation(ort_run(folded, feeds), ort_run(model, feeds)) < 1e-6

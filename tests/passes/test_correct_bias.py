"""A constant added to a layer's outputs, in whatever form the layer has: the outputs move by just that."""

from collections import Counter

import numpy as np
import pytest
from onnx import checker, numpy_helper, parser

from rdoq_onnx.model import surgeon
from rdoq_onnx.passes.correct_bias import add_to_bias
from tests.conftest import deviation

SHIFT = np.array([0.5, -2.0, 3.25])
IMAGE, VECTOR, MATRIX = (2, 4, 5, 5), (2, 4), (2, 5, 4)
CONV, GEMM = (3, 4, 3, 3), (4, 3)

# nodes (the layer is called "layer"), shape of x, constants, nodes that the correction adds
FORMS = {
    "conv without bias": ("[layer] y = Conv (x, w)", IMAGE, {"w": CONV}, 0),
    "conv with bias": ("[layer] y = Conv (x, w, b)", IMAGE, {"w": CONV, "b": (3,)}, 0),
    "conv in one dimension": ("[layer] y = Conv (x, w)", (2, 4, 7), {"w": (3, 4, 3)}, 0),
    "conv with a computed bias": (
        "c = Neg (b) m = ReduceMean <axes = [0, 2, 3], keepdims = 0> (x) s = Slice (m, from, to) d = Mul (c, s) "
        "[layer] y = Conv (x, w, d)",
        IMAGE,
        {"w": CONV, "b": (3,), "from": [0], "to": [3]},
        1,
    ),
    "transposed without bias": ("[layer] y = ConvTranspose <strides = [2, 2]> (x, w)", IMAGE, {"w": (4, 3, 2, 2)}, 0),
    "transposed with bias": ("[layer] y = ConvTranspose (x, w, b)", IMAGE, {"w": (4, 3, 2, 2), "b": (3,)}, 0),
    "gemm without C": ("[layer] y = Gemm <alpha = 0.5> (x, w)", VECTOR, {"w": GEMM}, 0),
    "gemm with an empty C": ("[layer] y = Gemm (x, w, )", VECTOR, {"w": GEMM}, 0),
    "gemm with C": ("[layer] y = Gemm (x, w, c)", VECTOR, {"w": GEMM, "c": (3,)}, 0),
    "gemm with beta": ("[layer] y = Gemm <beta = 0.25, transB = 1> (x, w, c)", VECTOR, {"w": (3, 4), "c": (3,)}, 0),
    "gemm with beta without C": ("[layer] y = Gemm <beta = 0.25> (x, w)", VECTOR, {"w": GEMM}, 0),
    "gemm with one number as C": ("[layer] y = Gemm (x, w, c)", VECTOR, {"w": GEMM, "c": ()}, 0),
    "gemm with a row as C": ("[layer] y = Gemm (x, w, c)", VECTOR, {"w": GEMM, "c": (1, 3)}, 0),
    "gemm with a column as C": ("[layer] y = Gemm (x, w, c)", VECTOR, {"w": GEMM, "c": (2, 1)}, 0),
    "gemm with a matrix as C": ("[layer] y = Gemm (x, w, c)", VECTOR, {"w": GEMM, "c": (2, 3)}, 0),
    "gemm with a computed C": (
        "c = Slice (x, from, to, axis) [layer] y = Gemm (x, w, c)",
        VECTOR,
        {"w": GEMM, "from": [0], "to": [3], "axis": [1]},
        1,
    ),
    "gemm with beta zero": ("[layer] y = Gemm <beta = 0.0> (x, w, c)", VECTOR, {"w": GEMM, "c": (3,)}, 1),
    "gemm with beta zero without C": ("[layer] y = Gemm <beta = 0.0> (x, w)", VECTOR, {"w": GEMM}, 1),
    "matmul": ("[layer] y = MatMul (x, w)", MATRIX, {"w": GEMM}, 1),
    "matmul, then Add": ("[layer] z = MatMul (x, w) y = Add (z, b)", MATRIX, {"w": GEMM, "b": (3,)}, 0),
    "matmul, then Add from the left": ("[layer] z = MatMul (x, w) y = Add (b, z)", MATRIX, {"w": GEMM, "b": (3,)}, 0),
    "matmul, then Add of one number": ("[layer] z = MatMul (x, w) y = Add (z, b)", MATRIX, {"w": GEMM, "b": ()}, 0),
    "matmul, then Add of a matrix": ("[layer] z = MatMul (x, w) y = Add (z, b)", MATRIX, {"w": GEMM, "b": (5, 3)}, 1),
    "matmul, then Add of a tensor": (
        "c = Slice (x, from, to, axis) [layer] z = MatMul (x, w) y = Add (z, c)",
        MATRIX,
        {"w": GEMM, "from": [0], "to": [3], "axis": [2]},
        1,
    ),
    "matmul, then Add of itself": ("[layer] z = MatMul (x, w) y = Add (z, z)", MATRIX, {"w": GEMM}, 1),
    "matmul on a matrix": ("[layer] y = MatMul (x, w)", VECTOR, {"w": GEMM}, 1),
    "weight on the left": ("[layer] y = MatMul (w, x)", (2, 4, 5), {"w": (3, 4)}, 1),
    "weight on the left, then Add": (
        "[layer] z = MatMul (w, x) y = Add (z, b)",
        (2, 4, 5),
        {"w": (3, 4), "b": (3, 1)},
        0,
    ),
    "weight on the left, then Add of a row": (
        "[layer] z = MatMul (w, x) y = Add (b, z)",
        (2, 4, 5),
        {"w": (3, 4), "b": (5,)},
        0,
    ),
}


def build(nodes, shape, constants, outputs="y"):
    signature = ", ".join(f"float[{', '.join('ABCD'[: len(shape)])}] {name}" for name in outputs.split())
    model = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 13]>
    g (float[{", ".join(map(str, shape))}] x) => ({signature}) {{ {nodes} }}""")
    rng = np.random.default_rng(0)
    for name, value in constants.items():
        array = np.array(value) if isinstance(value, list) else rng.standard_normal(value).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return model, {"x": rng.standard_normal(shape, np.float32)}


def corrected(model, shift=SHIFT):
    def change(graph):
        node = next(n for n in graph.nodes if n.name == "layer")
        side = 0 if node.inputs[0].name == "w" else 1
        add_to_bias(graph, node, shift, side)

    result = surgeon.edit(model, change)
    checker.check_model(result, full_check=True)
    return result


def shaped(form, rank):
    """SHIFT along the outputs of the layer."""
    if form.startswith("weight on the left"):
        return SHIFT[:, None]
    behind = rank - 2 if form.startswith(("conv", "transposed")) else 0
    return SHIFT.reshape(-1, *[1] * behind)


@pytest.mark.parametrize("form", FORMS)
def test_outputs_move_by_the_shift(ort_run, form):
    nodes, shape, constants, added = FORMS[form]
    model, feeds = build(nodes, shape, constants)
    before = model.SerializeToString(deterministic=True)
    changed = corrected(model)
    assert len(changed.graph.node) == len(model.graph.node) + added
    (old,) = ort_run(model, feeds, "none")
    times = 2 if "itself" in form else 1
    expected = [old + times * shaped(form, len(shape))]
    assert deviation(ort_run(changed, feeds, "none"), expected) < 1e-6
    assert deviation(ort_run(changed, feeds, "all"), expected) < 1e-5
    assert model.SerializeToString(deterministic=True) == before


def test_groups_of_a_transposed_convolution_have_outputs_of_their_own(ort_run):
    model, feeds = build("[layer] y = ConvTranspose <group = 2> (x, w)", IMAGE, {"w": (4, 3, 2, 2)})
    shift = np.arange(6.0) - 2
    (old,) = ort_run(model, feeds)
    assert deviation(ort_run(corrected(model, shift), feeds), [old + shift[:, None, None]]) < 1e-6


SHARED = {
    "a bias": "[layer] y = Conv (x, w, b) z = Conv (x, v, b)",
    "the constant of an Add": "[layer] p = MatMul (x, w) y = Add (p, b) z = Sub (x, b)",
}


@pytest.mark.parametrize("what", SHARED)
def test_other_readers_of_the_constant_keep_it(ort_run, what):
    image = "Conv" in SHARED[what]
    shape, weight = (IMAGE, CONV) if image else ((2, 5, 3), (3, 3))
    model, feeds = build(SHARED[what], shape, {"w": weight, "v": weight, "b": (3,)}, outputs="y z")
    y, z = ort_run(model, feeds)
    moved = ort_run(corrected(model), feeds)
    assert deviation(moved[:1], [y + (SHIFT[:, None, None] if image else SHIFT)]) < 1e-6
    np.testing.assert_array_equal(moved[1], z)


def test_a_layer_whose_output_is_read_elsewhere(ort_run):
    """The Add's constant cannot take the shift up: the other reader would miss it."""
    nodes = "[layer] p = MatMul (x, w) y = Add (p, b) z = Tanh (p)"
    model, feeds = build(nodes, MATRIX, {"w": GEMM, "b": (3,)}, outputs="y z")
    y, z = ort_run(model, feeds)
    changed = corrected(model)
    assert Counter(n.op_type for n in changed.graph.node)["Add"] == 2
    assert deviation(ort_run(changed, feeds), [y + SHIFT, np.tanh(np.arctanh(z.astype(np.float64)) + SHIFT)]) < 1e-4


def test_a_layer_whose_output_is_the_graphs(ort_run):
    model, feeds = build("[layer] y = MatMul (x, w) z = Add (y, b)", MATRIX, {"w": GEMM, "b": (3,)}, outputs="y z")
    y, z = ort_run(model, feeds)
    changed = corrected(model)
    assert [o.name for o in changed.graph.output] == ["y", "z"]
    assert deviation(ort_run(changed, feeds), [y + SHIFT, z + SHIFT]) < 1e-6

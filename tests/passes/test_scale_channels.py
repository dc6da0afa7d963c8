"""Factors that cancel: in constants, by a Mul in front of all consumers, or of one input of a node."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.scale_channels import ScaleChannels
from tests.conftest import deviation

R = np.array([0.5, 4.0, 1.5, 0.1])


@pytest.fixture(scope="module")
def model():
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 4] x) => (float[N, 3] y, float[N, 4] u) {
        [first] a = MatMul (x, v) [second] r = Relu (a) [branch] b = Identity (r) [third] y = MatMul (b, w)
        [fourth] u = Mul (r, s) }""")
    rng = np.random.default_rng(0)
    for name, shape in {"v": (4, 4), "w": (4, 3), "s": (4,)}.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape, np.float32), name))
    return model


@pytest.fixture
def feeds():
    return {"x": np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)}


def scaled(model, constants=None, tensors=None, operands=None):
    return run_passes([ScaleChannels(constants or {}, tensors or {}, operands or {})], model)


def types(model):
    return [n.op_type for n in model.graph.node]


def test_factors_in_constants_cancel(model, feeds, ort_run):
    constants = {("first", 1): 1 / R[None, :], ("third", 1): R[:, None], ("fourth", 1): R}
    after = scaled(model, constants)
    assert deviation(ort_run(after, feeds), ort_run(model, feeds)) < 1e-6
    assert types(after) == types(model)
    assert {t.name for t in after.graph.initializer} == {"v", "w", "s"}  # patterns select layers by their weights


def test_a_branch_becomes_the_mul(model, feeds, ort_run):
    after = scaled(model, {("third", 1): R[:, None]}, {"b": 1 / R})
    assert deviation(ort_run(after, feeds), ort_run(model, feeds)) < 1e-6
    assert types(after) == ["MatMul", "Relu", "Mul", "MatMul", "Mul"]
    assert "b" in {o for n in after.graph.node for o in n.output}


def test_a_mul_takes_over_the_name_of_the_tensor(model, feeds, ort_run):
    after = scaled(model, {("third", 1): R[:, None], ("fourth", 1): R}, {"r": 1 / R})
    assert deviation(ort_run(after, feeds), ort_run(model, feeds)) < 1e-6
    (mul,) = [n for n in after.graph.node if "r" in n.output]
    assert (mul.op_type, mul.name) == ("Mul", "r/scale_channels")


def test_an_operand_alone_is_multiplied(model, feeds, ort_run):
    after = scaled(model, {("fourth", 1): R}, operands={("fourth", 0): 1 / R})
    assert deviation(ort_run(after, feeds), ort_run(model, feeds)) < 1e-6
    assert types(after).count("Mul") == 2


def test_a_shared_constant_is_copied(feeds, ort_run):
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 4] x) => (float[N, 4] y) { [a] b = Mul (x, s) [c] y = Mul (b, s) }""")
    model.graph.initializer.append(numpy_helper.from_array(np.float32([1, 2, 3, 4]), "s"))
    after = scaled(model, {("a", 1): 2 * np.ones(4)})
    (before,), (got,) = ort_run(model, feeds), ort_run(after, feeds)
    np.testing.assert_allclose(got, 2 * before, rtol=1e-6)
    assert len(after.graph.initializer) == 2

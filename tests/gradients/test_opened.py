"""Gradients through fused operators: those of the standard operators that they stand for, by central differences."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rdoq_onnx.gradients.backward import static
from rdoq_onnx.gradients.packed_products import unpacked
from rdoq_onnx.gradients.reverse import reverse_model
from rdoq_onnx.passes.unfusing.unfuse import Unfuse
from tests import fused
from tests.conftest import OrtRun
from tests.fused import Case
from tests.gradients.test_reverse import RUNTIME, assert_adjoint, gradients, reverse, seeds_for

CASES = fused.OPENED | fused.CLOSED


def floats(model: onnx.ModelProto) -> list[str]:
    """Its float inputs, and the outputs of its MatMuls."""
    inputs = [i.name for i in model.graph.input if i.type.tensor_type.elem_type == TensorProto.FLOAT]
    return inputs + [n.output[0] for n in model.graph.node if n.op_type == "MatMul"]


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if floats(c.model)])
def test_matches_central_differences(name: str) -> None:
    case = CASES[name]
    model = static(case.model, case.feeds)
    at = [n for n in floats(model) if case.feeds.get(n, np.ones(1)).size]
    step = (
        2e-3 if name in ("Gelu", "BiasGelu", "standard Gelu") else 1e-6
    )  # the reference evaluator computes Erf in float32
    assert_adjoint(model, at, case.feeds, step, same=Unfuse(closed=True)(model))


def test_opened_only_where_it_computes_the_same() -> None:
    """A shared buffer for caches, of which the first 3 places are filled: the operator writes the new ones behind."""
    rng = np.random.default_rng(0)
    caches = {k: rng.standard_normal((1, 2, 9, 16)) for k in ("pk", "pv")}
    feeds = {**fused.FILLED, **caches, "ends": [3], "total": 4}
    case = Case(**{**vars(fused.GROUPS["GroupQueryAttention with caches, interleaved"]), "integers": feeds})
    model = static(case.model, case.feeds)
    result = reverse_model(model, ["q"], ["y"], feeds=case.feeds, runtime=RUNTIME)
    assert result.adjoints == {}
    assert result.missing["q"].startswith("no adjoint rule for operator GroupQueryAttention")


@pytest.mark.parametrize(("zeros", "bits"), [("none", 4), ("none", 8), ("packed", 2), ("packed", 4), ("float", 4)])
def test_weights_in_blocks(zeros: str, bits: int, ort_run: OrtRun) -> None:
    """MatMulNBits, whose weight has 40 inputs in blocks of 16, so that the last block is not full."""
    units, inputs, block = 6, 40, 16
    blocks, rng = -(-inputs // block), np.random.default_rng(bits)
    codes = rng.integers(0, 256, (units, blocks, block * bits // 8), np.uint8)
    scales = rng.random((units, blocks), np.float32) / 2**bits
    stored = {"B": codes, "scales": scales}
    if zeros == "packed":
        stored["zeros"] = rng.integers(0, 256, (units, -(-blocks * bits // 8)), np.uint8)
    elif zeros == "float":
        stored["zeros"] = rng.random((units, blocks), np.float32) * 2**bits
    node = helper.make_node(
        "MatMulNBits",
        ["x", *stored],
        ["z"],
        domain="com.microsoft",
        **{"K": inputs, "N": units, "bits": bits, "block_size": block, "accuracy_level": 1},
    )
    graph = helper.make_graph(
        [node, helper.make_node("Tanh", ["z"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3, units])],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    x = rng.standard_normal((2, 3, inputs), np.float32)
    result = reverse(model, ["x", "z"], {"x": x})
    seeds = seeds_for(result, rng)
    got = gradients(result, {"x": x}, seeds)
    eye = np.eye(inputs, dtype=np.float32)[None]
    linear = onnx.ModelProto()
    linear.CopyFrom(model)
    del linear.graph.node[1:]
    linear.graph.node[0].output[0] = "y"
    linear.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    linear.graph.input[0].type.tensor_type.shape.dim[1].dim_value = inputs
    (weight,) = ort_run(linear, {"x": eye})  # W^T, as ONNX Runtime has it
    np.testing.assert_allclose(got["x"], got["z"] @ weight[0].T, rtol=1e-4, atol=1e-5)


def test_the_lowest_bits_come_first() -> None:
    assert unpacked(np.array([[0b11100100]], np.uint8), 2).tolist() == [[0, 1, 2, 3]]

"""Nodes that compute in float read activations in float; inputs and outputs of integer kernels stay quantized."""

import numpy as np
import pytest

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.patterns import matches
from rdoq_onnx.config import Config
from tests.analysis.test_analyse import find
from tests.passes.test_insert_qdq import count, expect_numbers, quantized

NORM = "LayerNormalization <axis = -1>"
POST_NORM = f"""g (float[2, 5, 8] x) => (float[2, 5, 8] y)
    {{ m0 = MatMul (x, w0) n = {NORM} (m0, s, b) m1 = MatMul (n, w1) h = Relu (m1) m2 = MatMul (h, w2)
       r = Add (n, m2) y = {NORM} (r, s, b) }}"""
POST_NORM_WEIGHTS = {"w0": (8, 8), "w1": (8, 16), "w2": (16, 8), "s": (8,), "b": (8,)}
MAPS = "g (float[2, 4, 6, 6] x) => (float[2, 4, 6, 6] y)"
WEIGHTS = {"w1": (4, 4, 1, 1), "w2": (4, 4, 1, 1)}


def branches(network):
    """The consumers of each activation that has a branch: those on the branch and the others."""
    nodes = network.model.graph.node
    ends = {n.output[0]: n.input[0] for n in nodes if n.op_type == "Identity"}

    def readers(tensor):
        return sorted(n.op_type for n in nodes if tensor in n.input and n.op_type != "Identity")

    return {tensor: (readers(branch), readers(tensor)) for branch, tensor in ends.items()}


BRANCHES = {
    "the Add in front of a LayerNormalization": (POST_NORM, POST_NORM_WEIGHTS, {"n": (["MatMul"], ["Add"])}),
    "the skip around a whole network": (
        f"{MAPS} {{ z = Conv (x, w1) a = Relu (z) r = Conv (a, w2) y = Sub (x, r) }}",
        WEIGHTS,
        {"x": (["Conv"], ["Sub"])},
    ),
    "a product with a gate": (
        f"{MAPS} {{ t = Tanh (x) p = GlobalAveragePool (t) h = Sigmoid (p) g = Mul (t, h) z = Conv (t, w1)"
        " y = Add (g, z) }",
        {"w1": (4, 4, 1, 1)},
        {"t": (["Conv"], ["GlobalAveragePool", "Mul"])},
    ),
    "a layer after a movement operator": (
        "g (float[2, 3, 8] x, int64[2] d) => (float[2, 3, 8] y)"
        " { t = Tanh (x) v = Reshape (t, d) m = MatMul (v, w1) f = Shape (t) u = Reshape (m, f) y = Sub (t, u) }",
        {"w1": (8, 8)},
        {"t": (["Reshape"], ["Shape", "Sub"])},
    ),
    "a Concat of what is made in float": (
        f"{MAPS} {{ t = Tanh (x) u = Sin (x) c = Concat <axis = 1> (t, u) z = Conv (c, w3)"
        " m = ReduceMean <axes = [1], keepdims = 1> (c) y = Mul (z, m) }",
        {"w3": (4, 8, 1, 1)},
        {"c": (["Conv"], ["ReduceMean"])},
    ),
    "a body": (
        """g (float[2, 4] x) => (float[2, 4] y, float[2, 4] u)
        { t = Tanh (x) y = MatMul (t, w1)
          u = If (p) <then_branch = b1 () => (float[2, 4] i) { i = Sin (t) },
                      else_branch = b2 () => (float[2, 4] j) { j = Cos (t) }> }""",
        {"w1": (4, 4), "p": np.array(True)},
        {"t": (["MatMul"], [])},
    ),
}


@pytest.mark.parametrize("kind", BRANCHES)
def test_in_float_where_no_integer_kernel_profits(kind):
    text, weights, expected = BRANCHES[kind]
    assert branches(find(text, **weights)) == expected


QUANTIZED = {
    "a residual Add": f"{MAPS} {{ a = Conv (x, w1) b = Conv (a, w2) s = Add (a, b) y = Conv (s, w1) }}",
    "Tanh of what an integer convolution makes": f"""{MAPS}
        {{ z = Conv (x, w1) a = Relu (z) b = Conv (a, w2) t = Tanh (a) y = Mul (t, b) }}""",
    "Tanh of what an integer Add makes": f"""{MAPS}
        {{ a = Conv (x, w1) b = Conv (a, w2) s = Add (a, b) c = Conv (s, w1) t = Tanh (s) y = Mul (t, c) }}""",
    "a Concat of quantized parts": f"""{MAPS}
        {{ a = Tanh (x) b = Sin (x) c = Concat <axis = 1> (a, b) d = Conv (a, w1) e = Conv (b, w1) f = Conv (c, w3)
           g = Add (d, e) y = Add (f, g) }}""",
    "a Concat of what a convolution makes and others": f"""{MAPS}
        {{ t = Tanh (x) a = Conv (t, w1) b = Relu (a) c = Concat <axis = 1> (t, b) d = Conv (c, w3)
           m = ReduceMean <axes = [1], keepdims = 1> (c) y = Mul (d, m) }}""",
    "the shape alone": f"{MAPS} {{ t = Tanh (x) z = Conv (t, w1) d = Shape (t) y = Expand (z, d) }}",
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_where_integer_kernels_consume_or_produce_it(kind):
    assert branches(find(QUANTIZED[kind], **WEIGHTS, w3=(4, 8, 1, 1))) == {}


def test_a_sum_that_a_target_fuses_reads_integers():
    text = f"{MAPS} {{ t = Tanh (x) z = Conv (t, w1) r = Add (z, t) u = Sin (r) y = Conv (u, w2) }}"
    assert branches(find(text, **WEIGHTS)) == {"t": (["Conv"], ["Add"])}
    assert branches(find(text, Config(target="openvino"), **WEIGHTS)) == {}


def test_weights_only_needs_no_branch():
    assert branches(find(POST_NORM, Config(activation_bits=None), **POST_NORM_WEIGHTS)) == {}


def test_found_once():
    network = find(POST_NORM, **POST_NORM_WEIGHTS)
    again = analyse(network.model, Config().selection)
    assert (again.layers, again.activations) == (network.layers, network.activations)
    assert again.model.SerializeToString() == network.model.SerializeToString()
    assert [a.tensor for a in network.activations] == ["x", "n/quantized", "h"]


@pytest.mark.parametrize("pattern", ["n", "n/quantized"])
def test_pin_of_a_branch(pattern):
    network = find(POST_NORM, Config(pins=((pattern, 6),)), **POST_NORM_WEIGHTS)
    assert [a.tensor for a in network.activations if matches(pattern, a.names)] == ["n/quantized"]


@pytest.mark.parametrize("bits", [8, 4])
def test_the_file_has_the_float_tensor_beside_the_quantizer(ort_run, bits):
    case = quantized(POST_NORM, POST_NORM_WEIGHTS, ort_run, activation_bits=bits)
    nodes = {o: n for n in case.emitted.graph.node for o in n.output}
    assert "Identity" not in count(case.emitted)
    assert nodes["r"].input[0] == "n"
    assert [n.input[0] for n in nodes.values() if n.op_type == "QuantizeLinear"] == ["x", "n", "m1"]
    expect_numbers(case, ort_run)


def test_an_activation_that_is_an_output_of_the_model(ort_run):
    text = POST_NORM.replace("(float[2, 5, 8] y)", "(float[2, 5, 8] y, float[2, 5, 8] n)")
    case = quantized(text, POST_NORM_WEIGHTS, ort_run, activation_bits=8)
    assert [o.name for o in case.emitted.graph.output] == ["y", "n"]
    assert "Identity" not in count(case.emitted)
    expect_numbers(case, ort_run)

"""Beside narrow activations, what is not a layer reads a tensor of 8 bits where layers read a narrow branch of it."""

import numpy as np
import pytest
from onnx import numpy_helper

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.config import Config
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.scale_channels import ScaleChannels
from tests.analysis.test_analyse import find, tensors
from tests.analysis.test_float_consumers import MAPS, branches
from tests.passes.test_insert_qdq import count, expect_numbers, quantized

NARROW = Config(activation_bits=4)
WEIGHTS = {"w1": (4, 4, 1, 1), "w2": (4, 4, 1, 1), "w3": (4, 4, 1, 1)}
STREAM = f"""{MAPS}
    {{ z = Conv (x, w1) a = Relu (z) m = Conv (a, w2) s = Add (a, m) b = Relu (s) y = Conv (b, w3) }}"""

BRANCHES = {
    "a residual Add": (STREAM, {"a": (["Conv"], ["Add"])}, ["a", "m"]),
    "an Add behind a slice": (
        f"{MAPS} {{ z = Conv (x, w1) a = Relu (z) m = Conv <strides = [2, 2]> (a, w2)"
        " c = Slice (a, b0, b1, b2, b3) s = Add (c, m) r = Relu (s) y = ConvTranspose <strides = [2, 2]> (r, w3) }",
        {"a": (["Conv"], ["Slice"])},
        ["a", "m"],
    ),
    "an Add that computes in float, of what an integer Add makes": (
        f"{MAPS} {{ a = Conv (x, w1) b = Conv (a, w2) s = Add (a, b) c = Conv (s, w1) t = Add (s, c) y = Tanh (t) }}",
        {"a": (["Conv"], ["Add"]), "s": (["Conv"], ["Add"])},
        ["a", "b", "s", "c"],
    ),
    "none, as layers alone read it": (f"{MAPS} {{ a = Conv (x, w1) y = Conv (a, w2) }}", {}, []),
    "none, as a movement operator moves it to both": (
        f"{MAPS} {{ z = Conv (x, w1) p = MaxPool <kernel_shape = [1, 1]> (z) m = Conv (p, w2) s = Add (p, m)"
        " r = Relu (s) y = Conv (r, w3) }",
        {},
        ["m"],
    ),
}
AXES = {"b0": np.array([0, 0]), "b1": np.array([99, 99]), "b2": np.array([2, 3]), "b3": np.array([2, 2])}


@pytest.mark.parametrize("kind", BRANCHES)
def test_layers_read_a_branch(kind):
    text, expected, fusion = BRANCHES[kind]
    network = find(text, NARROW, **WEIGHTS, **AXES)
    assert branches(network) == expected
    assert tensors(network)[1] == fusion
    assert {t.removesuffix("/quantized") for t in tensors(network)[0]} >= expected.keys()


@pytest.mark.parametrize("kind", BRANCHES)
def test_wide_activations_need_no_branch(kind):
    assert branches(find(BRANCHES[kind][0], Config(activation_bits=8), **WEIGHTS, **AXES)) == {}


@pytest.mark.parametrize("kind", BRANCHES)
def test_found_once(kind):
    network = find(BRANCHES[kind][0], NARROW, **WEIGHTS, **AXES)
    again = analyse(network.model, NARROW.selection)
    assert (again.layers, again.activations) == (network.layers, network.activations)
    assert again.model.SerializeToString() == network.model.SerializeToString()


def test_a_branch_with_scaled_channels_leaves_the_stream_at_8_bits():
    network = find(STREAM, NARROW, **WEIGHTS)
    scaled = run_passes([ScaleChannels({}, {"a/quantized": np.full((1, 4, 1, 1), 2.0)}, {})], network.model)
    assert tensors(analyse(scaled, NARROW.selection)) == tensors(network)


def test_a_float_skip_stays_float():
    text = f"{MAPS} {{ t = Tanh (x) z = Conv (t, w1) r = Add (z, t) u = Sin (r) y = Conv (u, w2) }}"
    assert branches(find(text, NARROW, **WEIGHTS)) == {"t": (["Conv"], ["Add"])}
    assert tensors(find(text, NARROW, **WEIGHTS))[1] == ["z"]


def test_the_file_quantizes_the_stream_once_more_for_layers(ort_run):
    case = quantized(STREAM, WEIGHTS, ort_run, activation_bits=4)
    nodes = {o: n for n in case.emitted.graph.node for o in n.output}
    stream = nodes[nodes["s"].input[0]]
    assert stream.op_type == "DequantizeLinear"
    integers = nodes[stream.input[0]]
    assert integers.op_type == "QuantizeLinear"  # all 256 levels: no ceiling
    narrow = nodes[nodes["m"].input[0]]
    ceiling = nodes[narrow.input[0]]
    assert ceiling.op_type == "Clip"
    top = {t.name: numpy_helper.to_array(t) for t in case.emitted.graph.initializer}[ceiling.input[2]]
    assert top == 15
    assert nodes[nodes[ceiling.input[0]].input[0]].input[0] == integers.output[0]
    assert "Identity" not in count(case.emitted)
    expect_numbers(case, ort_run)

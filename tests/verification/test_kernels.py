"""Kernels of an optimized graph are counted, and traced back to the layers they implement."""

import numpy as np
import pytest
from onnx import helper, numpy_helper, parser

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.config import Config
from rdoq_onnx.verification.kernels import float_layers, kernel_counts

TEXT = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 3, 6, 6] x) => (float[N, 4, 6, 6] y)
{ [one] a = Conv (x, w) [act] b = Relu (a) [two] c = Conv (b, v) [tanh] d = Tanh (c) [three] y = Conv (d, v) }"""
MADE = {"one": "QLinearConv", "two": "QLinearConv", "three": "QLinearConv"}


def network(**options):
    model = parser.parse_model(TEXT)
    stored = {"w": np.ones((4, 3, 1, 1), np.float32), "v": np.ones((4, 4, 1, 1), np.float32)}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in stored.items())
    return analyse(model, Config(**options).selection)


def optimized(**kernels):
    nodes = [helper.make_node(op, ["x"], [name], f"{name}_token_7") for name, op in (MADE | kernels).items()]
    return helper.make_model(helper.make_graph(nodes, "g", [], []))


def test_operators_are_counted_by_name():
    assert list(kernel_counts(optimized(one="Conv")).items()) == [("Conv", 1), ("QLinearConv", 2)]


def test_integer_kernels_are_not_listed():
    assert float_layers(optimized(), network()) == {}


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ("two", "its output is read by Tanh"),
        ("three", "its output is an output of the model"),
    ],
)
def test_a_layer_that_runs_in_float_has_a_reason(layer, reason):
    found = float_layers(optimized(**{layer: "FusedConv"}), network())
    assert list(found) == [layer]
    assert reason in found[layer]


def test_float_activations_are_the_reason():
    found = float_layers(optimized(one="Conv"), network(activation_bits=None))
    assert found == {"one": "activations are float"}

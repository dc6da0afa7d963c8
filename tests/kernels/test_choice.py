"""Layers run in float where that is predicted to be faster; pins and other networks are left alone."""

from dataclasses import replace

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx import pipeline
from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.skips import SLOWER
from rdoq_onnx.config import Config
from rdoq_onnx.kernels.choice import slow_on_integers
from rdoq_onnx.system.progress import Progress

CONFIG = Config(weight_bits=8, activation_bits=8, effort="fast", threads=1)
NODES = """a = Conv <strides = [2, 2]> (x, w0) b = HardSwish (a) c = Conv <strides = [2, 2]> (b, w1) d = HardSwish (c)
    e = Conv (d, w2) f = HardSwish (e) y = Conv (f, w3)"""


@pytest.fixture(scope="module")
def model():
    model = parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[N, 3, 66, 66] x) => (float[N, 64, 15, 15] y) {{ {NODES} }}'
    )
    rng = np.random.default_rng(0)
    shapes = {"w0": (16, 3, 3, 3), "w1": (64, 16, 3, 3), "w2": (256, 64, 1, 1), "w3": (64, 256, 1, 1)}
    for name, shape in shapes.items():
        value = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) / 2)
        model.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    for node in model.graph.node:
        node.name = f"node of {node.output[0]}"
    return model


def sizes(scale=1):
    maps = {"x": (3, 66), "a": (16, 32), "b": (16, 32), "c": (64, 15), "d": (64, 15), "e": (256, 15), "f": (256, 15)}
    return {name: n * side**2 * scale for name, (n, side) in {**maps, "y": (64, 15)}.items()}


def chosen(model, config=CONFIG, scale=1, fallback=()):
    return slow_on_integers(analyse(model, config.selection), config, sizes(scale), fallback)


def test_a_first_layer_of_three_channels_stays_in_float(model):
    assert chosen(model, scale=64) == ("x",)


def test_small_layers_stay_in_float(model):
    small = {name: max(n // 256, 1) for name, n in sizes().items()}
    network = analyse(model, CONFIG.selection)
    assert slow_on_integers(network, CONFIG, small) == ("x", "b", "d", "f")


def test_pinned_activations_are_quantized(model):
    assert chosen(model, replace(CONFIG, pins=(("x", 8),)), scale=64) == ()


def test_narrow_activations_are_all_quantized(model):
    assert chosen(model, replace(CONFIG, activation_bits=4), scale=64) == ()


def test_what_a_layer_in_float_reads_is_not_quantized(model):
    assert "b" in chosen(model, scale=64, fallback=("c",))


def test_other_networks_are_quantized_throughout(model):
    plain = type(model)()
    plain.CopyFrom(model)
    for node in plain.graph.node:
        if node.op_type == "HardSwish":
            node.op_type = "Relu"
    assert chosen(plain, scale=64) == ()


def test_a_run_lists_them_and_emits_integer_products(model):
    samples = {"x": np.random.default_rng(1).standard_normal((16, 3, 66, 66)).astype(np.float32)}
    result = pipeline.run(model, samples, CONFIG, Progress())
    reasons = {s.node: s.reason for s in result.report.skipped}
    assert SLOWER in reasons["node of a"]
    assert "--pin x=8" in reasons["node of a"]
    kernels = result.report.kernels
    assert kernels["QLinearMul"] == 2
    assert kernels["QLinearConv"] == 2
    assert result.report.sqnr_db > 25
    pinned = pipeline.run(model, samples, replace(CONFIG, pins=(("x", 8),)), Progress())
    assert "node of a" not in {s.node for s in pinned.report.skipped}

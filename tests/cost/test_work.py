"""Multiplications of every kind of node, against counts by hand."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.config import Config
from rdoq_onnx.cost.early import sizes_of
from rdoq_onnx.cost.work import multiplications
from rdoq_onnx.system.runtime import Runtime
from tests.option_strategies import model_of

RUNTIME = Runtime("cpu", 1)


def network_of(text, shapes, ir=10, opset=21):
    model = parser.parse_model(f'<ir_version: {ir}, opset_import: ["": {opset}]> g {text}')
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in shapes.items()]
    model.graph.initializer.extend(weights)
    return analyse(model, Config().selection)


def counted(network, **inputs):
    return multiplications(network, sizes_of(network, Samples("made up", inputs), RUNTIME))


@pytest.mark.parametrize(
    ("node", "weight", "output", "expected"),
    [
        ("Conv <pads = [1, 1, 1, 1]>", (8, 4, 3, 3), (8, 6, 6), 8 * 6 * 6 * 4 * 9),
        ("Conv <group = 4>", (4, 1, 3, 3), (4, 4, 4), 4 * 16 * 9),
        ("Conv <strides = [2, 2]>", (8, 4, 1, 1), (8, 3, 3), 8 * 9 * 4),
        ("ConvTranspose <strides = [2, 2]>", (4, 5, 2, 2), (5, 12, 12), 36 * 4 * 5 * 4),
        ("ConvTranspose <group = 2>", (4, 5, 2, 2), (10, 7, 7), 36 * 4 * 5 * 4),
    ],
)
def test_convolutions(node, weight, output, expected):
    shape = ", ".join(map(str, output))
    network = network_of(f"(float[N, 4, 6, 6] x) => (float[N, {shape}] y) {{ [n] y = {node} (x, w) }}", {"w": weight})
    assert counted(network, x=np.ones((3, 4, 6, 6), np.float32)) == {"n": expected}


def test_matrices_and_a_product_of_activations():
    text = """(float[N, 5, 8] x) => (float[N, 5, 8] y)
    { [q] a = MatMul (x, wq) [k] b = MatMul (x, wk) t = Transpose <perm = [0, 2, 1]> (b) [qk] s = MatMul (a, t)
      [v] c = MatMul (s, wv) [out] y = MatMul (c, wo) }"""
    network = network_of(text, {"wq": (8, 6), "wk": (8, 6), "wv": (5, 4), "wo": (4, 8)})
    assert [product.node for product in network.products] == ["qk"]
    found = counted(network, x=np.ones((3, 5, 8), np.float32))
    assert found == {"q": 5 * 48, "k": 5 * 48, "v": 5 * 20, "out": 5 * 32, "qk": 25 * 6}


def test_tables_multiply_nothing_and_cells_apply_their_weights_once():
    table = analyse(model_of("table and layer"), Config().selection)
    found = counted(table, x=np.zeros((2, 5), np.int64))
    assert sorted(found.values()) == [0, 5 * 16]
    recurrent = analyse(model_of("recurrent"), Config(activation_bits=None).selection)
    assert sum(multiplications(recurrent, {}).values()) >= 32 * 4

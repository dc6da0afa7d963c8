"""Ridge regression: the weights of least squares for the inputs that a quantized network gives a layer."""

from dataclasses import replace

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.config import Config
from rdoq_onnx.refinement import ridge
from rdoq_onnx.refinement.ridge import Regression
from tests.cases import RUNTIME

FLOAT = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 4, 6, 6] x) => (float[N, 6, 6, 6] y)
<float[6, 2, 3, 3] w, float[6] b> { y = Conv <group = 2, pads = [1, 1, 1, 1]> (x, w, b) }"""
QUANTIZED = FLOAT.replace("{ y", "{ coarse = Round (x) y").replace("(x, w, b)", "(coarse, w, b)")


def model(text, weight, bias):
    result = parser.parse_model(text)
    del result.graph.initializer[:]
    result.graph.initializer.extend([numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")])
    result.graph.node[-1].name = "conv"
    return result


@pytest.fixture
def found():
    """The network's data, its unfolded coarse inputs [G, K, points] and outputs [G, O, points], and what is fitted."""
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(6, 2, 3, 3)).astype(np.float32), rng.normal(size=6).astype(np.float32)
    x = rng.normal(1, 1, size=(24, 4, 6, 6)).astype(np.float32)
    floats, coarse = model(FLOAT, weight, bias), model(QUANTIZED, weight, bias)
    (layer,) = analyse(floats, Config().selection).layers
    other = replace(layer, uses=(replace(layer.uses[0], data="coarse"),))
    rows, linear = layer.linear.rows(weight), layer.uses[0].linear
    regression = Regression(floats, coarse, [(layer, other, rows)])
    (y,) = RUNTIME.session(floats).run({"x": x})
    vectors, outputs = (
        np.moveaxis(v, 0, 2).reshape(*v.shape[1:3], -1) for v in (linear.unfold(np.rint(x), 24), linear.outputs(y, 24))
    )
    return (
        rows,
        vectors,
        outputs,
        lambda: layer.linear.grouped(regression.rows(Samples("test", {"x": x}), 7, RUNTIME)[0]),
    )


def test_without_a_penalty_it_is_least_squares(found, monkeypatch):
    monkeypatch.setattr(ridge, "PENALTY", 1e-9)
    _, vectors, outputs, fitted = found
    for x, y, w in zip(vectors, outputs, fitted(), strict=True):
        design = np.vstack([x, np.ones(x.shape[1])]).T.astype(np.float64)
        expected = np.linalg.lstsq(design, y.T.astype(np.float64), rcond=None)[0][:-1].T
        np.testing.assert_allclose(w, expected, rtol=1e-3, atol=1e-4)


def test_the_penalty_holds_weights_back(found, monkeypatch):
    rows, vectors, _, fitted = found
    start = rows.reshape(vectors.shape[0], -1, vectors.shape[1])
    moved = []
    for penalty in (0.03, 0.3, 3.0, 1e6):
        monkeypatch.setattr(ridge, "PENALTY", penalty)
        moved.append(np.abs(fitted() - start).max())
    assert moved == sorted(moved, reverse=True)
    assert moved[0] > 0.01
    assert moved[-1] < 1e-5

"""Channels pay for what reads them: nothing is lost, and only where nothing else joins them on the way."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.config import Config
from rdoq_onnx.profiling.micro_models import Slopes
from rdoq_onnx.profiling.prices import prices_of

MODEL = """<ir_version: 8, opset_import: ["": 17]>
g (float[2, 3, 8, 8] x) => (float[2, 4] y)
{ [a] z1 = Conv (x, w1) r1 = Relu (z1) [b] z2 = Conv (r1, w2) r2 = Relu (z2) [c] z3 = Conv (r2, w3)
  s = Add (z3, r1) g = GlobalAveragePool (s) f = Flatten (g) [d] y = Gemm (f, w4) }"""
SHAPES = {"w1": (8, 3, 1, 1), "w2": (16, 8, 1, 1), "w3": (8, 16, 1, 1), "w4": (8, 4)}
TIMES = {"a": 10.0, "b": 20.0, "c": 30.0, "d": 40.0}
SLOPES = {"a": Slopes(0.9, 0.1), "b": Slopes(0.8, 0.5), "c": Slopes(0.7, 0.6), "d": Slopes(0.3, 0.2)}


@pytest.fixture(scope="module")
def network():
    model = parser.parse_model(MODEL)
    rng = np.random.default_rng(0)
    model.graph.initializer.extend(
        numpy_helper.from_array(rng.standard_normal(shape, np.float32), name) for name, shape in SHAPES.items()
    )
    return analyse(model, Config().selection)


def prices(network, removable):
    return {k: (p.own, p.saved) for k, p in prices_of(network, TIMES, SLOPES, removable).items()}


def test_without_removable_channels_each_layer_pays_for_itself(network):
    assert prices(network, set()) == {"a": (10, 9), "b": (20, 16), "c": (30, 21), "d": (40, 12)}


def test_readers_are_paid_for_by_what_they_read(network):
    found = prices(network, {"a", "b", "c"})
    assert found["b"] == pytest.approx((20 - 0.5 * 20 + 0.6 * 30, 16 + 0.6 * 30))
    assert found["c"] == pytest.approx((30 - 0.6 * 30, 21))
    assert found["d"] == (40, 12), "a sum joins its channels"
    assert found["a"] == pytest.approx((10 + 0.5 * 20, 9 + 0.5 * 20))
    assert sum(own for own, _ in found.values()) == pytest.approx(sum(TIMES.values()))


def test_channels_that_stay_are_paid_for_by_their_readers(network):
    assert prices(network, {"a"})["c"] == (30, 21)

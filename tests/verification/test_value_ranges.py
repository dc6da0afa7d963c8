"""Ranges of weights and activations: of the float values, and of what the integers stand for."""

import numpy as np
import pytest
from onnx import numpy_helper

from rdoq_onnx.config import Config
from rdoq_onnx.pipeline import Job
from rdoq_onnx.system.progress import Progress
from tests.verification.test_layer_outputs import DATA, FIRST, SECOND, model_of


@pytest.fixture(scope="module", params=[3, 8])
def result(request):
    config = Config(weight_bits=request.param, activation_bits=8, threads=1, effort="fast")
    return Job.of(model_of(FIRST, SECOND), DATA, config, Progress()).result(config, details=True)


def test_weights(result):
    ranges = result.details.ranges.layers
    for (exact, quantized), weight in zip(ranges, (FIRST, SECOND), strict=True):
        assert exact == pytest.approx((weight.min(), weight.max()), rel=0.5)  # columns may be equalized
        assert quantized == pytest.approx(exact, abs=0.5 * np.ptp(weight))
    stored = {t.name: numpy_helper.to_array(t) for t in result.curves.network.model.graph.initializer}
    assert ranges[0][0] == (stored["w"].min(), stored["w"].max())
    assert (ranges[0][0] != ranges[0][1]) or (ranges[1][0] != ranges[1][1])


def test_activations(result):
    units = zip(result.curves.activations, result.allocation.activation_bits, strict=True)
    for (observed, quantized), (each, bits) in zip(result.details.ranges.activations, units, strict=True):
        assert observed == result.curves.observation.ranges[each.activation.tensor]
        ends = each.quantizers[bits](np.array([-1e6, 1e6], np.float32))
        assert quantized == pytest.approx(ends, rel=1e-6)

"""The distortion of a table's rounding alone: what a run with nothing else quantized measures."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.api import allocate, measure
from rdoq_onnx.calibration.load import load_samples
from rdoq_onnx.calibration.samples import input_specs
from rdoq_onnx.emission.weight_only import stored_weight
from rdoq_onnx.refinement.reference import Reference
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.verification.unsearched import unsearched_distortion

TEXT = """<ir_version: 8, opset_import: ["": 17]> g (int64[n, 4] ids) => (float[n, 4, 10] y)
{ e = Gather (table, ids) [first] y = MatMul (e, w) }"""


@pytest.fixture(scope="module")
def model():
    result = parser.parse_model(TEXT)
    rng = np.random.default_rng(0)
    for name, shape in (("table", (200, 32)), ("w", (32, 10))):
        result.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape, np.float32), name))
    return result


@pytest.mark.parametrize("bits", [3, 8])
def test_by_hand(model, bits):
    ids = np.random.default_rng(1).integers(0, 200, (64, 4))
    allocation = allocate(measure(model, {"ids": ids}, weights_only=True, threads=1), pins=(("table", bits),))
    samples = load_samples({"ids": ids}, input_specs(model), None)
    table, w = map(numpy_helper.to_array, model.graph.initializer)
    stored = stored_weight(allocation.measurement.network.weight_only[0], bits, table)
    error = (stored.integers * stored.scales - table)[ids] @ w
    expected = np.square(error).sum() / error.size
    reference = Reference(model, allocation.measurement, samples, Runtime("cpu", 1))
    assert unsearched_distortion(allocation, reference) == pytest.approx(expected, rel=1e-4)


def test_in_front_of_a_softmax(model):
    """The logits are measured, a tensor without a declared type."""
    behind = parser.parse_model(
        TEXT.replace("MatMul (e, w) }", "Softmax (z) }").replace("y = ", "z = MatMul (e, w) y = ")
    )
    behind.graph.initializer.extend(model.graph.initializer)
    ids = np.random.default_rng(1).integers(0, 200, (64, 4))
    samples = load_samples({"ids": ids}, input_specs(model), None)

    def distortion(network):
        allocation = allocate(measure(network, {"ids": ids}, weights_only=True, threads=1), pins=(("table", 3),))
        return unsearched_distortion(allocation, Reference(network, allocation.measurement, samples, Runtime("cpu", 1)))

    assert distortion(behind) == pytest.approx(distortion(model), rel=1e-4)

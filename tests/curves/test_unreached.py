"""Weights that no sample reaches."""

import numpy as np

import rdoq_onnx
from rdoq_onnx.curves.unreached import REASON
from tests.analysis.test_stored_weights import added, branch, feeds, model


def test_a_branch_that_never_runs_keeps_its_weights() -> None:
    """Nothing shows their effect, so they get as many bits as others, and the report says so."""
    proto = model(branch("d = MatMul (x, m) " + added("d")))
    given = feeds(proto, 40) | {"c": np.array(False)}
    result = rdoq_onnx.quantize(proto, given, threads=1, effort="fast", weights_only=True, weight_bits=4)
    (name,) = result.report.probed
    assert result.report.probed[name] == REASON
    (bits,) = [
        x for x, layer in zip(result.allocation.layer_bits, result.report.layers, strict=True) if layer.name == name
    ]
    assert bits.min() >= 3

"""Random small networks: what is emitted at 8 bits is as far from the float network as was predicted, or refused."""

from hypothesis import HealthCheck, given, settings

import rdoq_onnx
from tests.strategies import networks

MARGIN = 4.0  # measured over predicted distortion
FLOOR = 1e-6  # of the signal: 60 dB, where ties of rounding and biases in half precision decide


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(networks())
def test_emitted_as_predicted(drawn):
    model, samples = drawn
    try:
        report = rdoq_onnx.quantize(model, samples, bits=8, effort="fast", threads=1).report
    except rdoq_onnx.RdoqError:
        return  # with a reason, which other tests look at
    signal = report.measured * 10 ** (report.sqnr_db / 10)
    assert report.measured <= MARGIN * report.predicted + FLOOR * signal

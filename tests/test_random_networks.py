"""Random small networks: at 8 bits each is emitted and loses what was predicted, or refused."""

from hypothesis import HealthCheck, given, settings

import rdoq_onnx
from tests.strategies import networks

ROUNDING = 90  # dB, the noise of float32 arithmetic: a billionth of the output's power


@settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(networks())
def test_emitted_as_predicted_or_refused(drawn):
    model, samples = drawn
    try:
        report = rdoq_onnx.quantize(model, samples, bits=8, effort="fast", threads=1).report
    except rdoq_onnx.RdoqError:
        return  # with a reason, which other tests look at
    assert report.sqnr_db > 20
    assert report.sqnr_db > ROUNDING or report.measured <= 4 * report.predicted

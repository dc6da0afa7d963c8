"""Random small networks: at 8 bits each is emitted close to the float network, or refused."""

from hypothesis import HealthCheck, given, settings

import rdoq_onnx
from tests.strategies import networks


@settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(networks())
def test_emitted_close_or_refused(drawn):
    model, samples = drawn
    try:
        report = rdoq_onnx.quantize(model, samples, bits=8, effort="fast", threads=1).report
    except rdoq_onnx.RdoqError:
        return  # with a reason, which other tests look at
    assert report.sqnr_db > 10

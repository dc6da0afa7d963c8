"""What the report says of the divergence."""

import pytest

from rdoq_onnx.refinement.diversion import Diverted
from rdoq_onnx.report.outputs import DivergenceReport


def test_the_divergence_is_worded_with_what_diverted_bits_gained():
    found = DivergenceReport(False, 0.125, 0.25, Diverted(0.5, 0.375, 0.125))
    assert found.rows() == [
        ("divergence of the logits", "0.25 nats a row measured, 0.125 predicted"),
        ("bits moved for it", "0.5 -> 0.375 nats a row, for 0.12 dB"),
    ]
    assert found.document() == {
        "unit": "nats a row",
        "predicted": 0.125,
        "measured": 0.25,
        "diverted": {"before": 0.5, "after": 0.375, "cost_db": pytest.approx(0.125)},
    }


def test_without_curves_of_it_nothing_is_predicted():
    found = DivergenceReport(False, None, 0.25, None)
    assert found.rows() == [("divergence of the logits", "0.25 nats a row measured")]
    assert found.document()["diverted"] is None

"""Why a file is no faster than the float model, and what to do."""

from types import SimpleNamespace
from typing import Any

import pytest

from rdoq_onnx.analysis.skips import SLOWER, Skip
from rdoq_onnx.report.speed import slower, speed_hints
from rdoq_onnx.verification.latency import Latency

FAST, SLOW, UNSURE = Latency(1, 2, 1, 0.5, 0.1), Latency(32, 2, 3, 1.5, 0.1), Latency(8, 2, 2.4, 1.2, 0.3)


def report(**changed: Any) -> Any:
    figures = {
        "layers": (SimpleNamespace(op="Conv"),),
        "activation_bits": 8.0,
        "kernels": {"QLinearConv": 2},
        "float_layers": {},
        "storage": "packed",
        "skipped": (),
    }
    return SimpleNamespace(**figures | {"latency": (FAST,)} | changed)


def test_a_fast_file_needs_none() -> None:
    assert speed_hints(report()) == []
    assert speed_hints(report(latency=())) == []
    assert speed_hints(report(activation_bits=None, skipped=(Skip("n", "Conv", f"{SLOWER}; pin it"),))) == []
    assert speed_hints(report(activation_bits=None, storage="nbits")) == []
    assert speed_hints(report(layers=(SimpleNamespace(op="Gather"),), latency=(SLOW,))) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"activation_bits": None}, "it is smaller, not faster; --activation-bits 8"),
        (
            {"activation_bits": None, "latency": (SLOW,), "skipped": (Skip("n", "Conv", f"{SLOWER}; pin it"),)},
            "no integer kernel is predicted to be faster",
        ),
        ({"activation_bits": None, "latency": (SLOW,)}, "a batch of 32 takes 1.50 times as long as in float"),
        (
            {"activation_bits": None, "latency": (SLOW,), "storage": "nbits"},
            "1.50 times as long as in float: weights",
        ),
        (
            {"kernels": {"Conv": 2}, "float_layers": {"a": "why", "b": "why"}},
            "no layer runs on an integer kernel (why)",
        ),
        ({"kernels": {"Conv": 2}}, "ONNX Runtime fuses none"),
        ({"latency": (FAST, SLOW), "float_layers": {"a": "why"}}, "1.50 times as long as in float: 1 layer"),
        ({"latency": (FAST, SLOW)}, "the quantizers cost more than integer kernels save"),
    ],
)
def test_reasons(changed: dict[str, Any], said: str) -> None:
    (line,) = speed_hints(report(**changed))
    assert said in line
    assert "--" in line


def test_noise_is_no_slowness() -> None:
    assert slower((FAST, UNSURE)) is None
    assert slower((UNSURE, SLOW, FAST)) is SLOW

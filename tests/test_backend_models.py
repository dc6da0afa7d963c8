"""A sample of onnx.backend.test's models; `python -m tests.backend_models` runs them all."""

from tests.backend_models import cases, outcomes


def test_a_sample_of_the_backend_models() -> None:
    todo = list(cases())
    layers = [c for c in todo if c[0].startswith(("constant/test_conv", "constant/test_gemm", "constant/test_matmul"))]
    found = dict(outcomes([*layers[::4], *todo[::60]], jobs=2))
    assert [(name, *outcome) for name, outcome in found.items() if "FAULT" in outcome[0]] == []
    assert sum(outcome[0] == "emitted" for outcome in found.values()) >= 5

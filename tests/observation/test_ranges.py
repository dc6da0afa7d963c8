"""Ranges of tensors, computed inside the graph, against numpy."""

import numpy as np
import pytest
from onnx import parser

from rdoq_onnx.errors import CalibrationError
from rdoq_onnx.observation.ranges import ends_of, has_quiet_samples, margin, widened, with_ends
from rdoq_onnx.system.runtime import Runtime

RUNTIME = Runtime("cpu", 1)


def values_of(opset, x):
    """Return the outputs for x, its root, and the root in one dimension."""
    model = parser.parse_model(f"""<ir_version: 8, opset_import: ["": {opset}]>
    g (float[N, 2, 3] x) => (float[N, 2, 3] y) <int64[1] flat = {{-1}}>
    {{ y = Sqrt (x) z = Reshape (y, flat) }}""")
    session = RUNTIME.session(with_ends(model, ["x", "y", "z"]), "all")
    return dict(zip(session.outputs, session.run({"x": x}), strict=True))


@pytest.mark.parametrize("opset", [13, 18])
def test_ends_of_each_sample(opset):
    x = np.random.default_rng(0).uniform(0, 9, (4, 2, 3)).astype(np.float32)
    found = values_of(opset, x)
    np.testing.assert_allclose(found["y"], np.sqrt(x), rtol=1e-6)
    for count in (4, 2, 1):
        for name, value in {"x": x, "y": found["y"], "z": found["y"]}.items():
            rows = value.reshape(count, -1)
            np.testing.assert_array_equal(ends_of(name, found, count), [rows.min(axis=1), rows.max(axis=1)])


@pytest.mark.parametrize("bad", [np.nan, -np.inf, np.inf])
def test_a_single_value_that_is_not_finite_is_named(bad):
    x = np.ones((4, 2, 3), np.float32)
    x[2, 1, 1] = bad
    with pytest.raises(CalibrationError, match="tensor 'x' of the float model is not finite"):
        ends_of("x", values_of(17, x), 4)


def test_a_margin_is_no_wider_than_samples_differ():
    ends = np.array([[-1.0, -2.0, -2.0], [5.0, 9.0, 8.0]])
    assert widened(ends, 0.1) == (-2.0, 9.0 + 0.9)  # two samples share the lower end
    assert widened(ends, 0.9) == (-2.0, 9.0 + 4.0)
    assert margin(4) > margin(8) > margin(31) > 0
    assert margin(32) == margin(1000) == 0


def test_quiet_samples():
    loud = np.array([[-1.0] * 63, [1.0] * 63])
    assert has_quiet_samples(np.column_stack([loud, [-0.05, 0.05]]))
    assert not has_quiet_samples(np.column_stack([loud, [-0.05, 0.07]]))
    assert not has_quiet_samples(np.column_stack([loud, [0, 0]]))
    assert not has_quiet_samples(np.column_stack([loud, loud, [-0.05, 0.05]]))

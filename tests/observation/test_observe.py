"""One pass over the samples: ranges, sizes, batching, and what is rejected."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.normalization import NORMALIZE
from rdoq_onnx.config import Config
from rdoq_onnx.errors import CalibrationError
from rdoq_onnx.observation import batching
from rdoq_onnx.observation.batching import Batching
from rdoq_onnx.observation.inputs import samples_for
from rdoq_onnx.observation.observe import observe
from rdoq_onnx.observation.parts import whole
from rdoq_onnx.observation.ranges import margin
from rdoq_onnx.passes import run_passes
from rdoq_onnx.system.runtime import Runtime

RUNTIME = Runtime("cpu", 1)


def network(nodes, signature="(float[N, 6] x) => (float[N, 4] y)", shape=(6, 4), **constants):
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {signature} {{ {nodes} }}')
    constants = {"w": np.random.default_rng(0).standard_normal(shape, np.float32), **constants}
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
    return analyse(run_passes(NORMALIZE, model), Config().selection)


def seen(net, x):
    arrays = x if isinstance(x, dict) else {"x": x}
    parts = whole(o.name for o in net.model.graph.output)
    return observe(net, parts, samples_for(net.model, arrays, Config()), RUNTIME)


@pytest.fixture
def x():
    return np.random.default_rng(1).standard_normal((9, 6), np.float32)


def test_ranges_sizes_and_power(x):
    net = network("t = Relu (x) z = MatMul (t, w) y = Tanh (z)")
    found = seen(net, x)
    positive = np.maximum(x, 0)
    assert found.ranges == {"t": (0.0, positive.max() * (1 + margin(9)))}
    assert found.sizes == {"t": 6, "z": 4}
    assert found.metric.outputs == ("y",)
    assert found.metric.elements == 4
    assert found.batching.stackable


def test_ranges_are_those_of_all_batches(monkeypatch, x):
    monkeypatch.setattr(batching, "_MAX_BATCH", 2)
    x[0, 0], x[8, 5] = -40, 70
    found = seen(network("y = MatMul (x, w)"), x)
    assert found.batching == Batching(2, True)
    np.testing.assert_allclose(found.ranges["x"], np.array([-40, 70]) * (1 + margin(9)))


def test_an_end_shared_by_samples_is_a_bound(x):
    ceiling = np.array(0.5, np.float32)
    found = seen(network("t = Clip (x, zero, six) y = MatMul (t, w)", zero=np.array(0, np.float32), six=ceiling), x)
    assert found.ranges["t"] == (0.0, 0.5)


def refused(net, x, match):
    with pytest.raises(CalibrationError, match=match) as caught:
        seen(net, x)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_output_that_is_not_finite_is_refused(x):
    x[4, 2] = -1
    net = network(
        "a = Abs (x) z = MatMul (a, w) l = Log (x) s = ReduceSum <keepdims = 1> (l, one) y = Add (z, s)",
        one=np.array([1]),
    )
    refused(net, np.where(x == 0, 1, x), "output 'y' of the float model is not finite on the given samples")


def test_an_activation_that_is_not_finite_is_refused(x):
    """The output is finite, as is the arc tangent of infinity."""
    x[7, 0] = 0
    net = network("r = Reciprocal (x) z = MatMul (r, w) y = Atan (z)")
    message = refused(net, np.abs(x), "is not finite")
    assert "'r'" in message


def test_a_model_that_does_not_run_on_the_samples_is_refused(x):
    net = network("r = Reshape (x, bad) y = MatMul (r, w)", bad=np.array([5, 6]))
    refused(net, x, "the float model does not run on the samples")


def test_sizes_that_cannot_be_guessed_come_with_the_fix(x):
    net = network("r = Reshape (x, bad) y = MatMul (r, w)", bad=np.array([5, 6]))
    with pytest.raises(CalibrationError, match=r"synthetic samples \('x' \[64, .*give real samples with --calibration"):
        observe(net, whole(o.name for o in net.model.graph.output), samples_for(net.model, None, Config()), RUNTIME)


def test_a_model_without_floating_point_outputs_is_refused(x):
    net = network("z = MatMul (x, w) y = ArgMax <axis = 1> (z)", "(float[N, 6] x) => (int64[N, 1] y)")
    refused(net, x, "no floating-point output")

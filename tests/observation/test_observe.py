"""What one pass over the samples tells: ranges, sizes, how samples batch; and what it refuses."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.normalization import NORMALIZE
from rdoq_onnx.config import Config
from rdoq_onnx.errors import CalibrationError
from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.observation import batching
from rdoq_onnx.observation.batching import _MAX_BATCH, Batching, separated
from rdoq_onnx.observation.measured_outputs import measured_outputs
from rdoq_onnx.observation.observe import observe
from rdoq_onnx.observation.ranges import margin
from rdoq_onnx.passes import run_passes
from rdoq_onnx.pipeline import samples_for
from rdoq_onnx.system.runtime import Runtime

RUNTIME = Runtime("cpu", 1)


def network(nodes, signature="(float[N, 6] x) => (float[N, 4] y)", shape=(6, 4), **constants):
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {signature} {{ {nodes} }}')
    constants = {"w": np.random.default_rng(0).standard_normal(shape, np.float32), **constants}
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
    return analyse(run_passes(NORMALIZE, model), Config().selection)


def seen(net, x):
    arrays = x if isinstance(x, dict) else {"x": x}
    return observe(net, samples_for(net.model, arrays, Config()), RUNTIME)


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
    assert found.batching.rides


def test_ranges_are_those_of_all_batches(monkeypatch, x):
    monkeypatch.setattr(batching, "_MAX_BATCH", 2)
    x[0, 0], x[8, 5] = -40, 70
    found = seen(network("y = MatMul (x, w)"), x)
    assert found.batching == Batching(2, True)
    np.testing.assert_allclose(found.ranges["x"], np.array([-40, 70]) * (1 + margin(9)))


def test_an_end_that_samples_agree_on_is_a_bound(x):
    ceiling = np.array(0.5, np.float32)
    found = seen(network("t = Clip (x, zero, six) y = MatMul (t, w)", zero=np.array(0, np.float32), six=ceiling), x)
    assert found.ranges["t"] == (0.0, 0.5)


def test_outputs_that_saturate_are_measured_in_front_but_for_maps():
    image, kernel = "(float[N, 2, 4, 4] x) => (float[N, 3, 4, 4] y)", (3, 2, 1, 1)
    cases = {
        "z": network("z = MatMul (x, w) y = Sigmoid (z)"),
        "s": network("s = MatMul (x, w) p = Softmax (s) y = Identity (p)"),
        "y": network("c = Conv (x, w) b = Add (c, one) y = Sigmoid (b)", image, kernel, one=np.ones(1, np.float32)),
    }
    for measured, net in cases.items():
        assert measured_outputs(net.model) == [measured]
    softmax = network("c = Conv (x, w) y = Softmax <axis = 1> (c)", image, kernel)
    assert measured_outputs(softmax.model) == ["c"]


def test_large_tensors_make_small_batches(monkeypatch, x):
    net = network("y = MatMul (x, w)")
    assert seen(net, x).batching == Batching(_MAX_BATCH, True)
    # 4 bytes of 6 + 4 elements, three times over.
    monkeypatch.setattr(batching, "_MAX_BATCH_BYTES", 5 * 120)
    assert seen(net, x).batching == Batching(5, True)
    monkeypatch.setattr(batching, "_MAX_BATCH_BYTES", 1)
    assert seen(net, x).batching == Batching(1, True)


MIXING = {
    "mean over the batch": "z = MatMul (x, w) m = ReduceMean <axes = [0], keepdims = 1> (z) y = Sub (z, m)",
    "order of the batch": "f = Slice (x, last, past, zero, back) y = MatMul (f, w)",
    "softmax over the batch": "z = MatMul (x, w) y = Softmax <axis = 0> (z)",
}


@pytest.mark.parametrize("kind", MIXING)
def test_a_network_that_mixes_the_batch_is_fed_one_at_a_time(kind, x):
    slices = {"last": np.array([-1]), "past": np.array([-(2**31)]), "zero": np.array([0]), "back": np.array([-1])}
    found = seen(network(MIXING[kind], **slices), x)
    assert found.batching == Batching(1, False)
    assert found.metric.elements == 4


def test_a_mixture_that_only_an_inner_tensor_shows(x):
    """The output is the same for one or two samples; the layer's input is not."""
    net = network("m = ReduceMax <axes = [0], keepdims = 1> (x) d = Div (x, m) z = MatMul (d, w) y = Sign (z)")
    assert not seen(net, np.abs(x) + 1).batching.rides


def test_a_network_that_fails_on_two_samples_is_fed_one_at_a_time(x):
    net = network("r = Reshape (x, one) y = MatMul (r, w)", one=np.array([1, 6]))
    assert seen(net, x).batching == Batching(1, False)


def test_a_fixed_batch_is_obeyed(x):
    net = network("y = MatMul (x, w)", "(float[3, 6] x) => (float[3, 4] y)")
    found = seen(net, x)
    assert found.batching == Batching(3, False)
    assert found.sizes == {"x": 6, "y": 4}
    assert found.metric.elements == 4


def test_one_sample_shows_nothing(x):
    net = network("y = MatMul (x, w)")
    samples = samples_for(net.model, {"x": x}, Config()).take(slice(0, 1))
    assert observe(net, samples, RUNTIME).batching == Batching(1, False)


def refused(net, x, match):
    with pytest.raises(CalibrationError, match=match) as caught:
        seen(net, x)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_output_that_is_not_finite_is_refused(x):
    x[4, 2] = -1
    net = network("a = Abs (x) z = MatMul (a, w) l = Log (x) s = ReduceSum <keepdims = 1> (l, one) y = Add (z, s)",
                  one=np.array([1]))  # fmt: skip
    refused(net, np.where(x == 0, 1, x), "output 'y' of the float model is not finite on the samples given")


def test_an_activation_that_is_not_finite_is_refused(x):
    """Though the output is: the arc tangent of infinity is."""
    x[7, 0] = 0
    net = network("r = Reciprocal (x) z = MatMul (r, w) y = Atan (z)")
    message = refused(net, np.abs(x), "is not finite")
    assert "'r'" in message


def test_a_model_that_does_not_run_on_the_samples_is_refused(x):
    net = network("r = Reshape (x, bad) y = MatMul (r, w)", bad=np.array([5, 6]))
    refused(net, x, "the float model does not run on the samples")


def test_sizes_that_cannot_be_guessed_come_with_the_mend(x):
    net = network("r = Reshape (x, bad) y = MatMul (r, w)", bad=np.array([5, 6]))
    with pytest.raises(CalibrationError, match=r"synthetic samples \('x' \[64, .*give real ones: --calibration"):
        observe(net, samples_for(net.model, None, Config()), RUNTIME)


def test_a_model_without_floating_point_outputs_is_refused(x):
    net = network("z = MatMul (x, w) y = ArgMax <axis = 1> (z)", "(float[N, 6] x) => (int64[N, 1] y)")
    refused(net, x, "no output of a floating-point type")


def test_outputs_as_asked_for():
    model = network("z = MatMul (x, w) y = Tanh (z)").model
    changed = with_outputs(model, ["z", "x", "y"])
    assert [o.name for o in changed.graph.output] == ["z", "x", "y"]
    assert changed.graph.output[2] == model.graph.output[0]
    assert [o.name for o in model.graph.output] == ["y"]


FIXED = "(float[3, 6] x) => (float[3, 4] y)"


@pytest.mark.parametrize("kind", MIXING)
def test_rows_of_a_fixed_axis_that_mix_are_one_sample(kind, x):
    slices = {"last": np.array([-1]), "past": np.array([-(2**31)]), "zero": np.array([0]), "back": np.array([-1])}
    net = network(MIXING[kind], FIXED, **slices)
    samples = separated(net, samples_for(net.model, {"x": x}, Config()), RUNTIME)
    assert (len(samples), samples.rows, samples.batch) == (3, 3, 1)
    np.testing.assert_array_equal(samples.feeds([2, 0])["x"], x[[6, 7, 8, 0, 1, 2]])
    assert [n for n, _ in samples.counted_batches(8)] == [1, 1, 1]
    assert observe(net, samples, RUNTIME).metric.elements == 12


def test_rows_of_a_fixed_batch_stay_samples(x):
    net = network("z = MatMul (x, w) y = Softmax (z)", FIXED)
    samples = samples_for(net.model, {"x": x}, Config())
    assert separated(net, samples, RUNTIME) is samples


def test_one_batch_is_not_enough(x):
    net = network("y = MatMul (x, w)", FIXED)
    with pytest.raises(CalibrationError, match="arrays holds 1 batch of 3; at least 2 are needed"):
        separated(net, samples_for(net.model, {"x": x[:3]}, Config()), RUNTIME)

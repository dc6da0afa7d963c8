"""Batching of samples: rows that a network mixes run alone, a fixed size is kept, memory limits a batch."""

import numpy as np
import pytest

from rdoq_onnx.config import Config
from rdoq_onnx.errors import CalibrationError
from rdoq_onnx.observation import batching
from rdoq_onnx.observation.batching import _MAX_BATCH, Batching, separated
from rdoq_onnx.observation.inputs import samples_for
from rdoq_onnx.observation.observe import observe
from rdoq_onnx.observation.parts import whole
from tests.observation.test_observe import RUNTIME, network, seen


@pytest.fixture
def x():
    return np.random.default_rng(1).standard_normal((9, 6), np.float32)


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


def test_mixing_visible_only_in_an_inner_tensor(x):
    """The output is the same for one or two samples; the layer's input is not."""
    net = network("m = ReduceMax <axes = [0], keepdims = 1> (x) d = Div (x, m) z = MatMul (d, w) y = Sign (z)")
    assert not seen(net, np.abs(x) + 1).batching.stackable


def test_a_network_that_fails_on_two_samples_is_fed_one_at_a_time(x):
    net = network("r = Reshape (x, one) y = MatMul (r, w)", one=np.array([1, 6]))
    assert seen(net, x).batching == Batching(1, False)


def test_a_fixed_batch_is_kept(x):
    net = network("y = MatMul (x, w)", "(float[3, 6] x) => (float[3, 4] y)")
    found = seen(net, x)
    assert found.batching == Batching(3, False)
    assert found.sizes == {"x": 6, "y": 4}
    assert found.metric.elements == 4


def test_one_sample_is_too_few_to_tell(x):
    net = network("y = MatMul (x, w)")
    samples = samples_for(net.model, {"x": x}, Config()).take(slice(0, 1))
    assert observe(net, whole(o.name for o in net.model.graph.output), samples, RUNTIME).batching == Batching(1, False)


FIXED = "(float[3, 6] x) => (float[3, 4] y)"


@pytest.mark.parametrize("kind", MIXING)
def test_rows_of_a_fixed_axis_that_mix_are_one_sample(kind, x):
    slices = {"last": np.array([-1]), "past": np.array([-(2**31)]), "zero": np.array([0]), "back": np.array([-1])}
    net = network(MIXING[kind], FIXED, **slices)
    samples = separated(net, samples_for(net.model, {"x": x}, Config()), RUNTIME)
    assert (len(samples), samples.rows, samples.batch) == (3, 3, 1)
    np.testing.assert_array_equal(samples.feeds([2, 0])["x"], x[[6, 7, 8, 0, 1, 2]])
    assert [n for n, _ in samples.counted_batches(8)] == [1, 1, 1]
    assert observe(net, whole(o.name for o in net.model.graph.output), samples, RUNTIME).metric.elements == 12


def test_rows_of_a_fixed_batch_stay_samples(x):
    net = network("z = MatMul (x, w) y = Softmax (z)", FIXED)
    samples = samples_for(net.model, {"x": x}, Config())
    assert separated(net, samples, RUNTIME) is samples


def test_one_batch_is_not_enough(x):
    net = network("y = MatMul (x, w)", FIXED)
    with pytest.raises(CalibrationError, match="arrays holds 1 batch of 3; at least 2 are needed"):
        separated(net, samples_for(net.model, {"x": x[:3]}, Config()), RUNTIME)


def test_lengths_that_all_differ_can_share_a_batch():
    """Two samples cut to one length tell whether rows are independent."""
    rng = np.random.default_rng(0)
    for nodes, stackable in (("y = MatMul (x, w)", True), (MIXING["mean over the batch"], False)):
        net = network(nodes, "(float[N, T, 6] x) => (float[N, T, 4] y)")
        samples = samples_for(net.model, [{"x": rng.random((1, k, 6), np.float32)} for k in (2, 3, 7)], Config())
        found = observe(net, whole(["y"]), samples, RUNTIME)
        assert found.batching.stackable == stackable
        assert found.sizes["x"] == 24
        assert found.batching.peak == pytest.approx(7 / 4)

"""The float network runs once for all exact measurements, as far as memory allows to cache its tensors."""

from dataclasses import replace

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.observation.batching import Batching
from rdoq_onnx.probing.prefix import CACHE_BYTES
from rdoq_onnx.system.runtime import Runtime, Session
from tests.cases import Case
from tests.system.test_runtime import needs_cuda

SIZE = 4  # samples of a batch
SAMPLES = 10


def case(count=SAMPLES):
    """Two layers and a residual Add; six parts to measure."""
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 6] x) => (float[N, 6] y) {
        z = MatMul (x, w) a = Tanh (z) b = MatMul (a, v) c = Add (b, a) y = Sigmoid (c) }""")
    rng = np.random.default_rng(0)
    for name in "wv":
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal((6, 6), np.float32), name))
    samples = {"x": rng.standard_normal((count, 6), np.float32)}
    return Case(model, samples, widths=(2, 4), batching=Batching(SIZE, True))


def curves(prober, candidates):
    """Measure exact curves of every layer and activation, and of whole layers."""
    result = []
    for each in candidates.layers:
        result += [measure(each.layer, each.variants[0], each.mean) for measure in (prober.layer, prober.whole_layer)]
    result += [prober.activation(each.activation, each.flat) for each in candidates.activations]
    return result


@pytest.fixture
def forwards(monkeypatch):
    """Record the number of samples of each run from the network's inputs."""
    counts = []

    def counted(self, feeds, names=None, bound=Session.bound):
        if "x" in feeds:
            counts.append(len(feeds["x"]))
        return bound(self, feeds, names)

    monkeypatch.setattr(Session, "bound", counted)
    return counts


@pytest.fixture(scope="module")
def measured():
    this = case()
    return this, curves(replace(this.prober, memory=CACHE_BYTES), this.candidates)


ONE = 4 * (6 * 6)  # bytes of one sample of x, z, a, its branch for v, b and y, which have consumers


@pytest.mark.parametrize(("memory", "cached"), [(0, 0), (ONE * SIZE, 1), (ONE * 2 * SIZE, 2), (CACHE_BYTES, 3)])
def test_cached_samples_run_once_and_curves_stay_the_same(measured, forwards, memory, cached):
    this, expected = measured
    found = curves(replace(this.prober, memory=memory), this.candidates)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)
    batches, parts = 3, len(expected)
    assert len(this.network.layers) == 2
    assert parts == 4 + len(this.network.activations)
    assert len(forwards) == cached + (batches - cached) * parts


def test_the_cache_does_not_grow_with_the_samples(forwards):
    this = case(count=44)
    curves(this.prober, this.candidates)
    first, again = forwards[:8], forwards[8:]  # 32 samples and 12
    assert first == [SIZE] * 8
    assert len(again) == 3 * (4 + len(this.network.activations))


@needs_cuda
def test_exact_curves_on_a_gpu(measured):
    this, expected = measured
    found = curves(replace(this.prober, runtime=Runtime("cuda")), this.candidates)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3)

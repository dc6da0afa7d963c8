"""The float network runs once for all that is measured exactly, as far as its tensors may be kept."""

from dataclasses import replace

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.observation.batching import Batching
from rdoq_onnx.probing.prefix import KEPT
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
    """Exact curves of every layer and activation, and of whole layers."""
    found = []
    for each in candidates.layers:
        found += [measure(each.layer, each.variants[0], each.mean) for measure in (prober.layer, prober.whole_layer)]
    found += [prober.activation(each.activation, each.flat) for each in candidates.activations]
    return found


@pytest.fixture
def forwards(monkeypatch):
    """The samples of each run from the network's inputs."""
    seen = []

    def counted(self, feeds, names=None, bound=Session.bound):
        if "x" in feeds:
            seen.append(len(feeds["x"]))
        return bound(self, feeds, names)

    monkeypatch.setattr(Session, "bound", counted)
    return seen


@pytest.fixture(scope="module")
def measured():
    this = case()
    return this, curves(replace(this.prober, memory=KEPT), this.candidates)


ONE = 4 * (6 * 6)  # bytes of one sample of x, z, a, its branch for v, b and y, which are read somewhere


@pytest.mark.parametrize(("memory", "kept"), [(0, 0), (ONE * SIZE, 1), (ONE * 2 * SIZE, 2), (KEPT, 3)])
def test_each_sample_runs_once_where_there_is_room_and_curves_are_the_same(measured, forwards, memory, kept):
    this, expected = measured
    found = curves(replace(this.prober, memory=memory), this.candidates)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)
    batches, parts = 3, len(expected)
    assert len(this.network.layers) == 2
    assert parts == 4 + len(this.network.activations)
    assert len(forwards) == kept + (batches - kept) * parts


def test_what_is_kept_does_not_grow_with_the_samples(forwards):
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

"""Statistics in the scratch folder against those of all layers in memory; what is kept is not made again."""

from dataclasses import replace

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.candidates.moment_passes import collect
from rdoq_onnx.candidates.sensitivity import with_sensitivity
from rdoq_onnx.gradients.plan import LEAST_DRAWS
from tests.cases import RUNTIME, ignore, large_bench


def network():
    """Return three layers, of which two read the same input, and samples."""
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 4, 6] x) => (float[N, 4, 3] y)
    { a = MatMul (x, q) b = MatMul (x, k) c = Mul (a, b) d = Tanh (c) y = MatMul (d, v) }""")
    rng = np.random.default_rng(0)
    for name, shape in {"q": (6, 8), "k": (6, 8), "v": (8, 3)}.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape, np.float32), name))
    return model, {"x": rng.standard_normal((10, 4, 6), np.float32)}


def test_equal_those_in_memory(tmp_path):
    with large_bench(*network(), tmp_path) as large:
        large.collect({})
        bench, statistics = large.bench, large.statistics
        plain = collect(bench.network, bench.split.fitting, 5, RUNTIME, bench.pool, ignore)
        plan = bench.plan(replace(bench.network, activations=()), bench.split.fitting)
        plan = replace(plan, draws=LEAST_DRAWS)
        plain = with_sensitivity(plan, plain, ignore)
        (folder,) = tmp_path.iterdir()
        assert len(list(folder.glob("*-covariance-*"))) == 2
        assert len(list(folder.glob("*-basis-*"))) == 3
        for layer, expected in zip(bench.network.layers, plain, strict=True):
            found = statistics.moments(layer)
            np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(found.sensitivity, expected.sensitivity, rtol=1e-3, atol=1e-6)
            basis = statistics.basis(layer)
            turned = basis.swapaxes(1, 2) @ found.sensitivity @ basis
            diagonal = np.einsum("gkk->gk", turned)
            assert np.abs(turned - diagonal[..., None] * np.eye(diagonal.shape[1])).max() < 1e-4 * diagonal.max()


def test_what_is_kept_is_not_made_again(monkeypatch):
    with large_bench(*network()) as large:
        large.collect({})
        statistics, layers = large.statistics, large.bench.network.layers
        before = [np.array(statistics.get(kind, layers[1])) for kind in ("basis", "powers")]
        names, put = [], type(statistics).put
        monkeypatch.setattr(
            type(statistics),
            "put",
            lambda self, kind, layer, array: (names.append(kind), put(self, kind, layer, array)),
        )
        large.collect({})
        assert not names
        for kind in ("sensitivity", "basis", "powers"):
            statistics.scratch.drop(statistics.name(kind, layers[1]))
        large.collect({})
        assert sorted(names) == ["basis", "powers", "sensitivity"]
        after = [np.array(statistics.get(kind, layers[1])) for kind in ("basis", "powers")]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["weights", "activations 4"])
def test_regimes_have_names_of_their_own(name):
    with large_bench(*network()) as large:
        bench = replace(large.bench, keep=replace(large.bench.keep, name=name))
        statistics = type(large).of(bench).statistics
        assert statistics.name("mean", bench.network.layers[2]) == f"{name.replace(' ', '_')}-mean-2"

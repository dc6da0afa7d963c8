"""Quadratic forms of curves: exact sums of squared gradients, and nearly the curves of single samples."""

from dataclasses import replace

import numpy as np
import pytest
from onnx import numpy_helper, parser
from scipy.stats import spearmanr

from rdoq_onnx.candidates import blocks
from rdoq_onnx.candidates.candidates import Candidates, LayerCandidates
from rdoq_onnx.curves import forms
from rdoq_onnx.curves.forms import Form, form_portions, kept_form, marginal
from rdoq_onnx.curves.taylor import first_order
from rdoq_onnx.gradients.backward import Backward, weight_gradients
from tests.cases import ignore, large_bench
from tests.conftest import ROOT

MODELS = ROOT / "models"
LAYERS = {
    "conv": ("z = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w)", (6, 4, 3, 3)),
    "groups": ("z = Conv <pads = [1, 1, 1, 1], group = 2> (x, w)", (6, 2, 3, 3)),
    "depthwise": ("z = Conv <group = 4> (x, w)", (4, 1, 3, 3)),
    "transposed": ("z = ConvTranspose <strides = [2, 2], group = 2> (x, w)", (4, 3, 2, 2)),
    "matmul": ("z = MatMul (x, w)", (6, 5)),
    "matmul on the left": ("z = MatMul (w, x)", (5, 6)),
    "used twice": ("a = MatMul (x, w) b = Tanh (a) z = MatMul (b, w)", (6, 6)),
}


def network(kind, outputs="[3]"):
    """Return one layer in front of a nonlinearity, and samples. outputs: the axes over which a mean is taken."""
    nodes, shape = LAYERS[kind]
    model = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 4, 6, 6] x) => (float[N, A, B, C] y)
    {{ {nodes} t = Tanh (z) y = ReduceMean <axes = {outputs}> (t) }}""")
    rng = np.random.default_rng(1)
    model.graph.initializer.append(numpy_helper.from_array(0.4 * rng.standard_normal(shape, np.float32), "w"))
    return model, {"x": rng.standard_normal((9, 4, 6, 6), np.float32) + 0.5}


def gradients(large, layer):
    """Return ∇ of all samples and v, [runs, G, O, K], and the factor of their mean square."""
    bench = large.bench
    plan = bench.plan(replace(bench.network, activations=()), bench.split.measuring)
    mean = large.statistics.moments(layer).mean.astype(np.float32)[:, None]
    found, runs = [], 0
    for part in plan.by_shape():
        backward = Backward.of(part).loaded(plan.runtime)
        for done in backward.passes():
            each = weight_gradients(layer, mean, done, backward.reverse.adjoints)
            found.append(each.reshape(len(each), each.shape[1], len(done.rows), -1, each.shape[-1]))
            runs += done.count
    stacked = np.moveaxis(np.concatenate(found).astype(np.float64), 2, 1)
    return stacked.reshape(-1, *stacked.shape[2:]), 1 / (runs * plan.metric.elements)


@pytest.mark.parametrize("outputs", ["[1, 2, 3]", "[3]"], ids=["exact", "random signs"])
@pytest.mark.parametrize("kind", LAYERS)
def test_powers_are_the_mean_squares_of_turned_gradients(tmp_path, kind, outputs):
    with large_bench(*network(kind, outputs), tmp_path) as large:
        assert not large.collect({})
        (layer,) = large.bench.network.layers
        gradient, factor = gradients(large, layer)
        basis = large.statistics.basis(layer)
        np.testing.assert_allclose(
            basis.swapaxes(1, 2) @ basis, np.stack([np.eye(basis.shape[1])] * len(basis)), atol=1e-5
        )
        expected = factor * np.square(np.einsum("ngok,gkb->ngob", gradient, basis)).sum(axis=0)
        form = kept_form(large.statistics, layer)
        np.testing.assert_allclose(form.powers, expected, rtol=1e-3, atol=1e-4 * expected.max())
        # Along a vector of the basis, the form is the mean square itself.
        k = int(expected[0, 0].argmax())
        change = np.zeros_like(expected, np.float32)
        change[0, 0] = basis[0][:, k]
        rows = form.blocks.join(change)
        value = form(rows, np.arange(len(rows)))
        assert value.sum() == pytest.approx(factor * np.square(gradient[:, 0, 0] @ basis[0][:, k]).sum(), rel=1e-3)
        assert np.count_nonzero(value > 1e-9 * value.max()) == 1


@pytest.mark.parametrize("kind", ["conv", "groups", "transposed", "matmul"])
def test_forms_of_changes(monkeypatch, kind):
    """Σ_k p_jk (Uᵀ ΔW_j)_k², over all blocks of a row, in parts as well."""
    monkeypatch.setattr(blocks, "MOST_INPUTS", 4)
    rng = np.random.default_rng(2)
    with large_bench(*network(kind)) as large:
        (layer,) = large.bench.network.layers
    cut = blocks.Blocks(layer.linear)
    rows = rng.standard_normal((layer.linear.channels, cut.linear.row_length), np.float32)
    changes = cut.cut(rows)
    basis = np.linalg.qr(rng.standard_normal((len(changes), changes.shape[2], changes.shape[2])))[0].astype(np.float32)
    powers, shares = rng.random(changes.shape, np.float32), rng.random((len(changes), 1, changes.shape[2]), np.float32)
    squares = np.square(changes @ basis)
    units = np.array([2, 0]) if cut.single else np.arange(len(rows))
    found = Form(cut, basis, powers)(rows[units], units)
    every = cut.gather((squares * powers).sum(axis=2), 1)[:, 0]
    np.testing.assert_allclose(found, every[units], rtol=1e-4)
    found = Form(cut, basis, powers[..., :1], shares)(rows[units], units)
    every = cut.gather((squares * powers[..., :1] * shares).sum(axis=2), 1)[:, 0]
    np.testing.assert_allclose(found, every[units], rtol=1e-4)


def test_one_input_has_an_exact_form():
    """With K = 1, every channel's matrix is diagonal, and the form is the curve."""
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 1] x) => (float[N, 3] y) { a = MatMul (x, w) b = Tanh (a) y = Gemm (b, v) }""")
    rng = np.random.default_rng(1)
    for name, shape in {"w": (1, 7), "v": (7, 3)}.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape, np.float32), name))
    found, expected = compared(model, {"x": rng.standard_normal((20, 1), np.float32)}, layers=slice(1))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-12)


def compared(model, samples, bits=4, layers=slice(None)):
    """Return the forms, and the first-order curves, of all channels rounded to nearest, at one width."""
    with large_bench(model, samples, widths=(bits,)) as large:
        assert not large.collect({})
        layerwise, bench = large.coarse(), large.bench
        large.round(layerwise, bench.network.layers)
        network, candidates, found = bench.network, [], []
        for k, layer in enumerate(network.layers):
            measured, _ = layerwise.measured(layer, made=True)
            candidates.append(LayerCandidates(layer, measured.mean, ((measured.codes[bits],),)))
            change = measured.codes[bits].change(network.rows(layer))
            found.append(layerwise._work(k).form(change, np.arange(len(change))))
        alone = replace(network, activations=())
        plan = bench.plan(alone, bench.split.measuring)
        expected = first_order(plan, Candidates((bits,), tuple(candidates), ()), ignore).weights
    pairs = [(form, curve[0, :, 0]) for form, curve in zip(found, expected, strict=True)][layers]
    return (np.concatenate(each) for each in zip(*pairs, strict=True))


@pytest.mark.parametrize("name", ["digits_cnn", "digits_vit"])
def test_ranks_as_first_order_curves_do(name):
    found, expected = compared(MODELS / f"{name}.onnx", MODELS / "digits_calib.npz")
    assert spearmanr(found, expected).statistic > 0.95
    assert 0.8 < found.sum() / expected.sum() < 1.25


@pytest.mark.parametrize("kind", ["groups", "matmul", "transposed"])
def test_the_largest_networks_keep_sums_of_powers(monkeypatch, kind):
    with large_bench(*network(kind)) as large:
        large.collect({})
        (layer,) = large.bench.network.layers
        full = kept_form(large.statistics, layer)
    monkeypatch.setattr(forms, "MOST_WEIGHTS", 1)
    with large_bench(*network(kind)) as large:
        assert marginal(large.bench.network)
        large.collect({})
        few = kept_form(large.statistics, layer)
        assert few.powers.shape[2] == 1
        np.testing.assert_allclose(few.powers[..., 0], full.powers.sum(axis=2), rtol=1e-4)
        totals = full.powers.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(few.shares, totals / totals.sum(axis=2, keepdims=True), rtol=1e-4)
        # Summed over channels with the same change, both are the same.
        change = np.broadcast_to(
            np.random.default_rng(0).random(full.blocks.linear.row_length),
            (layer.linear.channels, full.blocks.linear.row_length),
        )
        values = [f(np.ascontiguousarray(change, np.float32), np.arange(len(change))).sum() for f in (few, full)]
        if full.blocks.single:
            assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_memory_divides_layers_and_changes_nothing():
    model, samples = MODELS / "digits_cnn.onnx", MODELS / "digits_calib.npz"
    kept = []
    for memory in (None, 1):
        with large_bench(model, samples, samples=6) as large:
            if memory:
                large = replace(large, statistics=replace(large.statistics, memory=memory))
                assert len(form_portions(large.bench.network, 1)) == len(large.bench.network.layers)
            large.collect({})
            statistics = large.statistics
            kept.append(
                [
                    np.array(statistics.get(kind, layer))
                    for layer in statistics.network.layers
                    for kind in ("covariance", "sensitivity", "basis", "powers")
                    if statistics.has(kind, layer)
                ]
            )
    assert len(kept[0]) == len(kept[1]) > 3 * 8
    for one, other in zip(*kept, strict=True):
        np.testing.assert_array_equal(one, other)

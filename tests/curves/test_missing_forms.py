"""Forms that stand in for those of a layer without an adjoint."""

import numpy as np
import pytest

from rdoq_onnx.curves.forms import kept_form
from rdoq_onnx.curves.missing_forms import form_of, lacks_gain, output_form
from tests.cases import large_bench
from tests.curves.test_forms import LAYERS, network


@pytest.mark.parametrize("kind", LAYERS)
def test_the_form_of_the_output_is_its_power(kind):
    """E‖ΔW(x - E[x])‖² of each channel, at one position."""
    with large_bench(*network(kind)) as large:
        statistics, bench = large.statistics, large.bench
        (layer,) = bench.network.layers
        large.collect({})
        moments = statistics.moments(layer)
        form = output_form(layer, moments, np.linalg.eigh(moments.covariance)[1], 2.0)
        rows = bench.network.rows(layer)
        change = np.random.default_rng(0).standard_normal(rows.shape).astype(np.float32)
        grouped = layer.linear.grouped(change).astype(np.float64)
        power = np.einsum("gok,gkl,gol->go", grouped, moments.covariance, grouped)
        expected = power.sum(axis=0) if form.blocks.shared else power.reshape(-1)
        np.testing.assert_allclose(form(change, np.arange(len(rows))), 2 * expected, rtol=1e-3)


@pytest.mark.parametrize("kind", ["conv", "groups", "transposed", "matmul"])
def test_the_whole_layer_agrees_with_an_exact_run(kind):
    with large_bench(*network(kind), widths=(2, 7)) as large:
        statistics, bench = large.statistics, large.bench
        (layer,) = bench.network.layers
        large.collect({})
        assert not lacks_gain(statistics, layer)
        statistics.scratch.drop(statistics.name("powers", layer))
        assert lacks_gain(statistics, layer)
        layerwise = large.coarse()
        large.round(layerwise, [layer])
        assert not lacks_gain(statistics, layer)
        measured, curves = layerwise.measured(layer, made=True)
        (exact,) = bench.check(1).whole_layer(layer, [measured.codes[7]], measured.mean)
        change = measured.codes[7].change(bench.network.rows(layer))
        assert form_of(statistics, layer)(change, np.arange(len(change))).sum() == pytest.approx(exact, rel=1e-3)
        assert np.isfinite(curves).all()
        assert curves[:, -1].sum() == pytest.approx(exact, rel=1e-3)


def test_weights_on_the_widest_grid_are_scaled_at_the_next():
    model, samples = network("matmul")
    tensor = model.graph.initializer[0]
    grid = np.random.default_rng(0).integers(-60, 60, tuple(tensor.dims)).astype(np.float32)
    grid[0] = 63
    tensor.raw_data = (grid / 512).tobytes()
    with large_bench(model, samples, widths=(2, 7)) as large:
        statistics = large.statistics
        (layer,) = large.bench.network.layers
        large.collect({})
        powers = kept_form(statistics, layer).powers
        statistics.scratch.drop(statistics.name("powers", layer))
        layerwise = large.coarse()
        large.round(layerwise, [layer])
        _, curves = layerwise.measured(layer, made=True)
    assert powers.any()
    assert (curves[:, 1] < 1e-9 * curves[:, 0]).all()
    assert (curves[:, 0] > 0).all()

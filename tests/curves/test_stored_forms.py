"""Curves of weights that no product unfolds, against exact runs of the network."""

import numpy as np
import pytest

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.normalization import NORMALIZE
from rdoq_onnx.candidates.candidates import FLOAT_LIMIT
from rdoq_onnx.candidates.table_rows import TableRows
from rdoq_onnx.config import Config
from rdoq_onnx.curves.forms import kept_form
from rdoq_onnx.curves.layer_work import LayerWork
from rdoq_onnx.curves.stored_forms import StoredWeights, stored_statistics, table_form
from rdoq_onnx.passes import run_passes
from rdoq_onnx.system.threads import workers
from tests.analysis.test_stored_weights import FOUND, feeds, model
from tests.cases import large_bench

GRU = next(nodes for nodes in FOUND if "GRU" in nodes)
TABLE = next(iter(FOUND))


@pytest.mark.parametrize("nodes", [GRU, TABLE], ids=["cell", "table"])
def test_curves_are_near_exact_runs(nodes):
    proto = model(nodes)
    with large_bench(proto, feeds(proto, 240)) as large:
        bench = large.bench
        rows, lost = bench.table_rows()
        prober = bench.check(1)
        stored = StoredWeights(bench.network, (3, 6, 8), rows, prober, bench.pool)
        assert not lost
        # From a state of zeros, one step reads nothing of a cell's recurrent weights.
        for layer in (x for x in bench.network.stored if x.weight != "gr"):
            measured, curves = stored.measured(layer)
            exact = prober.whole_layer(layer, [measured.codes[b] for b in (3, 6, 8)])
            assert (np.diff(curves.sum(axis=0)) < 0).all()
            np.testing.assert_allclose(curves.sum(axis=0)[1:], exact[1:], rtol=0.8)


def test_compensation_lowers_the_form_of_a_table():
    network = analyse(run_passes(NORMALIZE, model(TABLE)), Config().selection)
    (layer,) = network.stored
    mixing = np.random.default_rng(0).standard_normal((16, 3))
    second = mixing @ mixing.T + 1e-3 * np.eye(16)
    rows = TableRows(np.stack([second, second])[:, None], np.full(300, 0.1), 300)
    with workers(1) as pool:
        stored = StoredWeights(network, (3,), {layer.name: rows}, None, pool)
        measured, curves = stored.measured(layer)
        plain = StoredWeights(network, (3,), {}, None, pool)
        work = table_form(layer, rows)
        nearest = plain._rounded(_work(stored, layer), plain.moments(layer), 3)
    assert curves.sum() < 0.5 * work(nearest.codes.change(network.rows(layer)), np.arange(300)).sum()
    assert curves[:, 0] == pytest.approx(work(measured.codes[3].change(network.rows(layer)), np.arange(300)))


def _work(stored, layer):
    return LayerWork(layer, stored.network.rows(layer), table_form(layer, stored.rows[layer.name]), FLOAT_LIMIT, None)


def test_large_networks_keep_the_same_forms():
    proto = model(TABLE)
    with large_bench(proto, feeds(proto, 60)) as large:
        rows, _ = large.bench.table_rows()
        (layer,) = large.bench.network.stored
        for kind, array in stored_statistics(layer, rows[layer.name]).items():
            large.statistics.put(kind, layer, array)
        change = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32)
        kept = kept_form(large.statistics, layer)(change, np.arange(300))
        np.testing.assert_allclose(kept, table_form(layer, rows[layer.name])(change, np.arange(300)), rtol=1e-5)

"""Layers worked on elsewhere: only what is kept of one travels, and what comes back is what would have been made."""

import numpy as np
from onnx import numpy_helper, parser

from rdoq_onnx.curves.layer_tasks import names_for
from tests.cases import large_bench


def network():
    """Return a tied table, two layers that read one input, and samples."""
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
    g (int64[N, 5] x) => (float[N, 5, 90] y)
    { e = Gather (table, x) a = MatMul (e, q) b = MatMul (e, k) c = Mul (a, b) d = Tanh (c) z = Add (d, e)
      t = Transpose <perm = [1, 0]> (table) y = MatMul (z, t) }""")
    rng = np.random.default_rng(0)
    for name, shape in {"table": (90, 12), "q": (12, 12), "k": (12, 12)}.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape, np.float32), name))
    return model, {"x": rng.integers(0, 90, (12, 5))}


def rounded(folder, compute=None):
    """Return all arrays after rounding and compensation, by name."""
    with large_bench(*network(), folder, activation_bits=None) as large:
        if compute is not None:
            large.bench.pool.sums.compute = compute
        rows, _ = large.bench.table_rows()
        large.collect(rows)
        layerwise = large.coarse()
        searched = large.bench.network.searched
        large.round(layerwise, searched)
        large.refine(layerwise, searched, lambda layers: None, None)
        scratch = large.statistics.scratch
        return {name: np.array(scratch.get(name)) for name in scratch.names()}, layerwise


def test_what_comes_back_is_what_would_have_been_made(tmp_path):
    seen = []

    def compute(asked, indices):
        """Compute backwards, from what can travel."""
        for index in reversed(indices):
            work, part = asked.blocks[index]
            item = part.loaded()
            if asked.name == "layers":
                seen.append((item[0], sorted(item[1])))
            yield index, asked.works[work].loaded()(item)

    expected, layerwise = rounded(tmp_path)
    found, _ = rounded(tmp_path, compute)
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert len(seen) > len(layerwise.network.searched)
    for key, names in seen:
        index = key if isinstance(key, int) else key[0]
        assert set(names) <= {*names_for(layerwise, index)}
        assert not any("codes" in name and not name.endswith(f"-{index}") for name in names)


def test_a_layer_takes_the_moments_of_its_input_with_it(tmp_path):
    _, layerwise = rounded(tmp_path)
    second = next(k for k, x in enumerate(layerwise.network.weights) if x.weight == "k")
    first = next(k for k, x in enumerate(layerwise.network.weights) if x.weight == "q")
    kinds = {tuple(name.rsplit("-", 2)[1:]) for name in names_for(layerwise, second)}
    assert {("covariance", str(first)), ("mean", str(first)), ("basis", str(second))} <= kinds
    assert ("basis", str(first)) not in kinds

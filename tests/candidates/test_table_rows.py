"""Sensitivity to the rows of a table: gradients of rows, and how often rows are looked up."""

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper, parser

from rdoq_onnx.candidates.table_rows import TableRows
from tests.cases import large_bench

ROWS, WIDTH = 30, 5


def model(lookup: str = "e = Gather (table, i)") -> ModelProto:
    """y [N, 4] is linear in the table's rows, so that first order is exact."""
    proto = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]> g (int64[N, T] i) => (float[N, 4] y) {{
        {lookup} h = MatMul (e, a) y = ReduceSum <keepdims = 0> (h, one) }}""")
    rng = np.random.default_rng(0)
    tensors: dict[str, NDArray[np.generic]] = {
        "table": rng.standard_normal((300, WIDTH), np.float32),
        "a": rng.standard_normal((WIDTH, 4), np.float32),
        "one": np.array([1]),
    }
    proto.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in tensors.items())
    return proto


def rows(indices: NDArray[np.int64], proto: ModelProto | None = None) -> TableRows:
    with large_bench(proto or model(), {"i": indices}) as large:
        found, lost = large.bench.table_rows()
    assert lost == {}
    (each,) = found.values()
    return each


def test_the_second_moment_is_that_of_the_gradients() -> None:
    """Each of y's elements sums a column of a over the positions: F is a aᵀ, up to its trace."""
    indices = np.random.default_rng(1).integers(0, ROWS, (400, 3))
    found = rows(indices)
    a = numpy_helper.to_array(model().graph.initializer[1]).astype(np.float64)
    expected = a @ a.T / np.trace(a @ a.T)
    for second in found.seconds[:, 0]:
        np.testing.assert_allclose(second / np.trace(second), expected, atol=0.08)
    basis, shares = found.spectrum()
    np.testing.assert_allclose((basis[0] * shares[0]) @ basis[0].T, found.seconds[1, 0] / np.trace(found.seconds[1, 0]))


def test_gains_follow_how_often_rows_occur() -> None:
    """Row 0 is in all samples, rows 1 to 20 in a few each, the others in none."""
    rng = np.random.default_rng(2)
    indices = np.stack([np.zeros(200, np.int64), rng.integers(1, 21, 200)], axis=1)
    found = rows(indices)
    gains = found.gains
    assert found.seen == 21
    assert gains[0] == pytest.approx(20 * gains[1:21].mean(), rel=0.3)
    assert 0 < gains[21:].max() < gains[1:21].min()
    assert np.ptp(gains[21:]) < 1e-12


def test_samples_of_all_shapes_count() -> None:
    """Gradients come from the most common shapes alone."""
    feeds = [{"i": np.full((1, 1 + n), n)} for n in range(12) for _ in range(4)]
    with large_bench(model(), feeds) as large:
        found, _ = large.bench.table_rows()
    (each,) = found.values()
    assert each.seen > 8


def test_samples_that_share_their_indices() -> None:
    """Positions are the same for all samples: their table is looked up once for a batch."""
    positions = (
        "p = Shape <start = 1, end = 2> (i) z = Squeeze (p) r = Range (start, z, step) q = Unsqueeze (r, first) "
    )
    proto = model(positions + "b = Gather (table, q) c = Gather (other, i) e = Add (b, c)")
    numbers: dict[str, NDArray[np.generic]] = {
        "start": np.array(0),
        "step": np.array(1),
        "first": np.array([0]),
        "other": np.random.default_rng(3).standard_normal((300, WIDTH), np.float32),
    }
    proto.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in numbers.items())
    indices = np.random.default_rng(1).integers(0, ROWS, (200, 3))
    with large_bench(proto, {"i": indices}) as large:
        found, lost = large.bench.table_rows()
    assert lost == {}
    shared, own = sorted(found.values(), key=lambda each: each.seen)
    assert shared.seen == 3
    # In each sample, three rows of one table and up to three of the other have the same gradients.
    # The sum over a batch is a single draw, so there are few.
    assert 0.4 < shared.gains[:3].sum() / own.gains[:ROWS].sum() < 2.5


def test_positions_beyond_the_longest_sample_count_as_the_last_one() -> None:
    """A longer sample would look them up; their words it would not."""
    indices = np.tile(np.arange(6), (60, 1))
    gains = rows(indices).gains
    assert gains[6:].min() == pytest.approx(gains[:6].mean(), rel=0.5)
    shuffled = rows(indices + np.array([3, 0, 9, 1, 2, 5])).gains
    assert shuffled[50:].max() < 0.05 * gains[:6].mean()

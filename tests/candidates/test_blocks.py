"""Rows cut into blocks and joined again; each block has the covariance of its own inputs."""

import numpy as np
import pytest

from rdoq_onnx.candidates import blocks
from rdoq_onnx.candidates.blocks import Blocks, in_parts
from rdoq_onnx.model.linear import Linear

LINEARS = {
    "conv": Linear("Conv", (6, 4, 3, 3)),
    "grouped conv": Linear("Conv", (6, 2, 3, 3), group=2),
    "depthwise conv": Linear("Conv", (4, 1, 3, 3), group=4),
    "transposed": Linear("ConvTranspose", (4, 3, 2, 2)),
    "grouped transposed": Linear("ConvTranspose", (4, 3, 2, 2), group=2),
    "gemm": Linear("Gemm", (11, 5)),
    "gemm, other way round": Linear("Gemm", (5, 11), trans_b=True),
    "matmul on the left": Linear("MatMul", (5, 11), weight_side=0),
}
MOST = [2048, 5, 4, 1]  # one part; several, the last one often padded; one per input


@pytest.fixture(params=MOST)
def most(request, monkeypatch):
    monkeypatch.setattr(blocks, "MOST_INPUTS", request.param)
    return request.param


@pytest.fixture(params=LINEARS)
def linear(request):
    return LINEARS[request.param]


def inputs_of_a_group(linear):
    length = int(np.prod(linear.shape)) // linear.channels
    return length // linear.group if linear.op_type == "ConvTranspose" else length


def test_join_undoes_cut(linear, most):
    blocks = Blocks(linear)
    rows = np.random.default_rng(0).standard_normal((linear.channels, blocks.linear.row_length))
    cut = blocks.cut(rows)
    assert blocks.parts == -(-inputs_of_a_group(linear) // most)
    assert len(cut) == linear.group * blocks.parts
    assert cut.shape[2] <= most
    np.testing.assert_array_equal(blocks.join(cut), rows)
    assert cut.flags["C_CONTIGUOUS"]


def test_blocks_compute_the_layers_product(linear, most):
    """W X in blocks, summed over the parts, is the layer's own product."""
    blocks, rng = Blocks(linear), np.random.default_rng(1)
    rows = rng.standard_normal((linear.channels, blocks.linear.row_length))
    x = rng.standard_normal((linear.group, inputs_of_a_group(linear), 9))
    products = blocks.cut(rows) @ in_parts(x)
    summed = products.reshape(linear.group, blocks.parts, *products.shape[1:]).sum(axis=1)
    np.testing.assert_allclose(summed, linear.grouped(rows) @ x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trials", [1, 3])
def test_spread_reaches_the_blocks_of_each_row(linear, most, trials):
    """Scales spread over the blocks scale their own rows."""
    blocks, rng = Blocks(linear), np.random.default_rng(2)
    rows = rng.standard_normal((linear.channels, blocks.linear.row_length))
    scales = rng.standard_normal((linear.channels, trials))
    spread = blocks.spread(scales)
    repeated = np.repeat(blocks.cut(rows), trials, axis=1)
    assert spread.shape == repeated.shape[:2]
    scaled = (repeated * spread[..., None]).reshape(len(spread), -1, trials, repeated.shape[2])
    for t in range(trials):
        np.testing.assert_array_equal(blocks.join(scaled[:, :, t]), rows * scales[:, t, None])


@pytest.mark.parametrize("trials", [1, 3])
def test_gather_sums_over_the_blocks_of_each_row(linear, most, trials):
    """Sums of squares within blocks add up to those of the rows."""
    blocks, rng = Blocks(linear), np.random.default_rng(3)
    rows = rng.standard_normal((trials, linear.channels, blocks.linear.row_length))
    squares = [np.square(blocks.cut(r)).sum(axis=2) for r in rows]
    gathered = blocks.gather(np.stack(squares, axis=2).reshape(len(squares[0]), -1), trials)
    np.testing.assert_allclose(gathered, np.square(rows).sum(axis=2).T, rtol=1e-12)


def test_gather_of_spread_multiplies_by_the_blocks_of_a_row(linear, most):
    blocks = Blocks(linear)
    values = np.random.default_rng(4).standard_normal((linear.channels, 2))
    times = blocks.parts * (linear.group if blocks.shared else 1)
    np.testing.assert_allclose(blocks.gather(blocks.spread(values), 2), times * values, rtol=1e-12)


def test_rows_of_one_group_can_be_cut_separately(linear, most):
    blocks = Blocks(linear)
    rows = np.random.default_rng(5).standard_normal((linear.channels, blocks.linear.row_length))
    assert blocks.single == (linear.group == 1)
    assert blocks.shared == (linear.op_type == "ConvTranspose")
    if blocks.single:
        np.testing.assert_array_equal(blocks.cut(rows[1:3]), blocks.cut(rows)[:, 1:3])
        np.testing.assert_array_equal(blocks.join(blocks.cut(rows[1:3])), rows[1:3])

"""Rows of bits: exactly as many as the channels have, laid out as the module's FORMAT says."""

import math

import numpy as np
import pytest

from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.packing import bit_rows
from rdoq_onnx.passes.packing.pack_weights import PackWeights
from tests.passes.packing.test_pack_weights import decoders, integers, packed_equal, rows_and_codes


@pytest.fixture(autouse=True)
def small_weights_too(monkeypatch):
    """Weights as small as those of these tests save less than the nodes take that decode them."""
    monkeypatch.setattr(bit_rows, "_GROUP_NODES", -1000)
    monkeypatch.setattr(bit_rows, "_SHARED_NODES", 0)


def test_rows_have_exactly_the_bits_of_the_channels(ort_run):
    """Eight rows of bits in a row of bytes; a byte a channel, and one a group."""
    some, more, other = np.array([3, 1, 8, 5]), np.array([2, 7]), np.array([0, 4, 6, 0, 1])
    weights = {
        "a": (integers((4, 3, 3), 0, some, 0), 0),
        "b": (integers((3, 2, 3), 1, more, 1), 1),
        "c": (integers((5, 7), 0, other, [0, 1, 0, 0, 1]), 0),
        "d": (integers((5, 7), 0, 1, 1), 0),
    }
    packed = packed_equal(ort_run, weights)
    rows, codes = rows_and_codes(packed)
    assert [r.shape for r in rows] == [(math.ceil((11 + 5) / 8), 7), (math.ceil((17 + 9) / 8), 9)]
    assert codes.nbytes == (5 + 5 + 1) + (4 + 2 + 1)
    assert not any(t.name in weights for t in packed.graph.initializer)


def test_rows_are_laid_out_as_documented():
    """Read back in plain Python, from nothing but the numbered invariants."""
    weights = {
        "a": (integers((3, 5), 0, [3, 0, 6], [1, 0, 0]), 0),
        "b": (integers((2, 5), 0, [1, 4], [1, 0]), 0),
        "c": (integers((4, 2, 2), 0, [2, 7, 0, 8], [0, 1, 0, 0]), 0),
    }
    packed = run_passes([PackWeights(list(weights))], decoders(weights))
    groups, codes = rows_and_codes(packed)
    codes = codes.tolist()
    for k, names, stored in ((4, "c", groups[0]), (5, "ab", groups[1])):
        bits = [[int(byte) >> j & 1 for byte in row] for row in stored for j in range(8)]
        got, begin = [], 0
        for _ in range(sum(len(weights[n][0]) for n in names)):
            b, h = divmod(codes.pop(0), 2)
            p = begin % 8
            below, planes = bits[begin - p : begin], bits[begin : begin + b]
            values = []
            for i in range(k):
                value = sum(plane[i] << j for j, plane in enumerate(planes))
                value = (value + (sum(plane[i] << j for j, plane in enumerate(below)) > 2**p / 2)) % 2**b
                values.append((1 - 2 * h) * (value - 2**b * (2 * value >= 2**b) if b else 0))
            got.append(values)
            begin += b
        bits = bits[begin:]
        assert codes.pop(0) // 2 == len(bits) < 8
        assert not np.any(bits)
        np.testing.assert_array_equal(got, np.concatenate([weights[n][0].reshape(-1, k) for n in names]))


def test_widths_are_the_least_that_hold_the_integers():
    rows = {(0, 0): 0, (-1, 0): 2, (0, 1): 3, (-1, 1): 4, (-1, 2): 5, (-2, 2): 6, (0, 64): 15, (-64, 64): 16}
    packed = run_passes([PackWeights(["w"])], decoders({"w": (np.array(list(rows), np.int8), 0)}))
    assert rows_and_codes(packed)[1].tolist()[:-1] == list(rows.values())

"""Rows read on demand: conversions and blocks."""

import numpy as np

from rdoq_onnx.calibration.rows import Converted, blocks


def test_rows_are_converted_on_demand():
    asked = []

    def halved(values):
        asked.append(len(values))
        return values[:, :1] / 2

    rows = Converted(np.arange(12).reshape(6, 2), (1,), np.dtype("float64"), halved)
    assert (rows.shape, asked) == ((6, 1), [])
    assert rows[[5, 0]].tolist() == [[5.0], [0.0]]
    assert asked == [2]


def test_blocks_hold_all_samples_in_order(monkeypatch):
    monkeypatch.setattr("rdoq_onnx.calibration.rows._BLOCK", 3 * 8)
    rows, picked = np.arange(20).reshape(10, 2), np.array([7, 1, 2, 9, 0])
    parts = list(blocks(rows, picked))
    assert [len(part) for part in parts] == [2, 1, 1, 1]
    np.testing.assert_array_equal(np.concatenate(parts), rows[picked])
    assert len(list(blocks(rows, picked[:0]))) == 1

"""Pins: the pinned width or the nearest narrower one offered; anything else is an error that names the option."""

import numpy as np
import pytest

from rdoq_onnx.allocation.budget import allocate_bits
from rdoq_onnx.allocation.pins import pinned
from rdoq_onnx.config import Config
from rdoq_onnx.errors import ConfigError
from tests.allocation.test_budget import CHANNELS, measurement

PINS = {
    "first": (slice(0, 4), 5),
    "w2": (slice(4, 8), 2),
    "f.*": (slice(0, 4), 0),
    "a1": (slice(CHANNELS + 1, CHANNELS + 2), 6),
}


@pytest.mark.parametrize("pattern", PINS)
def test_pin(pattern):
    rows, bits = PINS[pattern]
    allocation = allocate_bits(measurement(2), Config(weight_bits=3, activation_bits=4, pins=((pattern, bits),)))
    choice = np.concatenate([*allocation.layer_bits, allocation.activation_bits])
    assert (choice[rows] == bits).all()
    free = np.delete(choice, np.r_[rows])
    assert len(np.unique(free)) > 1
    # Pinned units count in the budget.
    assert allocation.weight_average <= 3
    assert allocation.activation_average <= 4


def test_a_pattern_may_pin_several():
    allocation = allocate_bits(measurement(2), Config(weight_bits=4, activation_bits=8, pins=((".*d", 3), ("w1", 6))))
    assert [np.unique(b).tolist() for b in allocation.layer_bits] == [[6], [3], [3]]


def test_pin_to_a_width_that_is_not_offered():
    table = measurement(2, widths=(2, 4))
    # 8 bits of a layer beside integer activations are 7 in the file; so a pin takes the nearest width under it.
    restricted = pinned(table, (("first", 3),))
    assert np.isfinite(restricted.distortion[:4]).nonzero()[1].tolist() == [2] * 4
    with pytest.raises(ConfigError, match=r"--pin first=1: 'first' offers \[2, 4\] bits"):
        pinned(table, (("first", 1),))
    with pytest.raises(ConfigError, match=r"--pin z2=4: 'z2' offers \[8\] bits"):
        pinned(table, (("z2", 4),))


def test_a_fusion_tensor_keeps_its_width_beside_others():
    table = measurement(2)
    restricted = pinned(table, (("z2|a1", 4),))
    widths = [np.flatnonzero(np.isfinite(row)).tolist() for row in restricted.distortion[CHANNELS + 1 : CHANNELS + 3]]
    assert widths == [[4], [8]]


def test_pins_leave_other_curves_as_they_are():
    table = measurement(2)
    restricted = pinned(table, (("second", 3),))
    others = np.delete(np.arange(len(restricted.elements)), np.r_[4:8])
    np.testing.assert_array_equal(restricted.distortion[others], table.curves.distortion[others])
    assert pinned(table, ()).distortion.tolist() == table.curves.distortion.tolist()

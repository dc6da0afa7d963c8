"""The table of targets: its keys, and what the rest of the code assumes of its rows."""

from typing import get_args

import pytest

from rdoq_onnx.targets import CASTS_INT4, COMPLETE, TARGETS, Storage, TargetName

EVERY = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


def test_every_target_has_its_row():
    assert {name: target.name for name, target in TARGETS.items()} == {name: name for name in get_args(TargetName)}


@EVERY
def test_storages_are_known_and_int8_is_one(target):
    assert set(target.storages) <= set(get_args(Storage))
    assert "int8" in target.storages


@EVERY
def test_the_widest_weights_hold_the_limit(target):
    assert target.weight_limit < 128  # INT8
    assert 2 ** (target.widest - 1) >= target.weight_limit


def test_int4_came_before_the_rest():
    assert CASTS_INT4 <= COMPLETE

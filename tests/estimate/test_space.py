"""Estimates of memory and scratch space grow with the work, and are compared with what there is."""

import shutil
from collections import namedtuple

import pytest

from rdoq_onnx.config import Config
from rdoq_onnx.curves import large
from rdoq_onnx.estimate.space import BASE, Space, shortages, space
from rdoq_onnx.system.scratch import Scratch
from tests.estimate.test_seconds import work

GB = 10**9


def test_small_networks_need_no_scratch_space(monkeypatch):
    assert space(work(), 0).scratch == 0
    monkeypatch.setattr(large, "LARGE", 0)
    found = space(work(), 5)
    weights = sum(x.weights for x in work().layers)
    assert found.scratch > 5 + 9 * weights
    one = {"activation_bits": None, "block_size": (0,)}
    assert space(work(**one), 5).scratch < found.scratch
    assert space(work(**one), 5).scratch < space(work(activation_bits=None), 5).scratch


@pytest.mark.parametrize(("less", "more"), [({"width": 64}, {"width": 4096}), ({"effort": "fast"}, {})])
def test_more_takes_more(less, more):
    less, more = {"activation_bits": None, **less}, {"activation_bits": None, **more}
    assert BASE < space(work(**less), 0).memory <= space(work(**more), 0).memory
    if "width" in more:
        assert space(work(**less), 0).memory < space(work(**more), 0).memory


def test_what_is_clearly_too_much_is_said(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9 * GB, 7 * GB, 2 * GB))
    config, scratch = Config(memory=GB), Scratch(tmp_path)
    assert shortages(Space(GB, 2 * GB), config, scratch) == ()
    memory, disk = shortages(Space(3 * GB, 4 * GB), config, scratch)
    assert memory == "the run may take 3.0 GB of memory, but --memory allows 1.0 GB"
    assert disk.startswith(f"the run may take 4.0 GB of scratch space, but {tmp_path} has 2.0 GB free")
    assert "this machine has" in shortages(Space(10**15, 0), Config(), scratch)[0]

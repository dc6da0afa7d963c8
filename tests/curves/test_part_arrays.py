"""Large arrays of a shard's sums: in files of their own, written once, mapped when read."""

import numpy as np
import pytest

from rdoq_onnx.curves import part_arrays
from rdoq_onnx.curves.part_arrays import Filed, PartArrays, has_filed
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.system.scratch import Scratch
from rdoq_onnx.system.tree_sum import TreeSum

ARRAYS = tuple(np.arange(n, dtype=np.float64) for n in (100, 2))
VALUE = {"nodes": (((0, 1), (3, *ARRAYS)),), "name": "a"}


@pytest.fixture
def arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(part_arrays, "PARKED", 500)
    monkeypatch.setattr(part_arrays, "LEAST_PARKED", 100)
    return PartArrays(Scratch(checkpoint=tmp_path / "part.npz"))


def test_large_arrays_of_a_large_sum_are_in_files(arrays):
    filed = arrays.filed(VALUE)
    ((node, (count, large, small)),) = filed["nodes"]
    assert (node, count, filed["name"]) == ((0, 1), 3, "a")
    assert isinstance(large, Filed)
    assert small is ARRAYS[1]
    assert has_filed(filed)
    assert not has_filed(arrays.filed(ARRAYS[1:]))
    ((_, (_, *found)),) = arrays.mapped(filed)["nodes"]
    for one, other in zip(found, ARRAYS, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not found[0].flags.writeable
    assert found[1] is not ARRAYS[1]


def test_an_array_in_a_file_is_not_written_again(arrays):
    parked = arrays.park(ARRAYS)
    (name,) = arrays.scratch.names()
    assert arrays.filed(parked)[0] == Filed(name)
    assert arrays.filed(parked[::-1])[1] == Filed(name)
    arrays.filed((parked[0][1:], *parked))  # a part of an array is another one
    assert len(arrays.scratch.names()) == 2


def test_files_that_no_sum_refers_to_are_removed(arrays):
    one, other = arrays.filed(ARRAYS), arrays.filed(ARRAYS)
    arrays.scratch.put("mean-0", ARRAYS[0])
    arrays.keep([{"nodes": one}])
    assert arrays.scratch.names() == ["mean-0", one[0].name]
    arrays.mapped(one)
    with pytest.raises(ConfigError, match="is incomplete"):
        arrays.mapped(other)


def test_a_tree_of_parked_sums_has_the_bits_of_one_in_memory(arrays):
    values = [tuple(np.random.default_rng(k).standard_normal(n) for n in (100, 2)) for k in range(7)]
    trees = TreeSum(7, arrays.park), TreeSum(7)
    for k in (3, 0, 6, 1, 5, 2, 4):
        for tree in trees:
            tree.add(tuple(map(np.copy, values[k])), k)
    for one, other in zip(*(tree.result() for tree in trees), strict=True):
        assert one.tobytes() == other.tobytes()

"""Values of graphsurgeon's constants: mapped while they are read, or copied from the protobuf."""

import numpy as np
from onnx import TensorProto, numpy_helper

from rdoq_onnx.model import surgeon
from rdoq_onnx.model.equality import same_bytes
from rdoq_onnx.model.external import Shelf
from rdoq_onnx.model.lazy_values import Stored


def test_values_are_loaded_when_asked_for(tmp_path, monkeypatch):
    array = np.arange(12.0).reshape(3, 4)
    inside = numpy_helper.from_array(array, "t")
    outside = Shelf(lambda: tmp_path).put(TensorProto(name="t", data_type=inside.data_type, dims=inside.dims), array)
    for tensor, writable in ((inside, True), (outside, False)):
        values = Stored(tensor).load()
        np.testing.assert_array_equal(values, array)
        assert values.flags.writeable == writable


def test_mapped_values_are_not_kept(tmp_path):
    array = np.arange(12.0)
    tensor = Shelf(lambda: tmp_path).put(TensorProto(name="t", data_type=TensorProto.DOUBLE, dims=[12]), array)
    constant = surgeon.constant("t", tensor)
    np.testing.assert_array_equal(surgeon.values(constant), array)
    assert isinstance(constant._values, Stored)


def test_bytes_tell_values_apart():
    zero, nan = np.zeros(2, np.float32), np.full(2, np.nan, np.float32)
    assert same_bytes(nan, nan.copy())
    assert not same_bytes(zero, -zero)
    assert not same_bytes(zero, zero.astype(np.float64))
    assert not same_bytes(zero, zero.reshape(2, 1))
    assert same_bytes(np.arange(6).reshape(2, 3).T, np.ascontiguousarray(np.arange(6).reshape(2, 3).T))

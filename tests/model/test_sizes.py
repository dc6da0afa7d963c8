"""Models over 2 GB through the storing passes, which must never serialize them whole; limits are lowered here."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto

from rdoq_onnx.model import sizes
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.packing.pack_vectors import PackVectors
from rdoq_onnx.passes.packing.pack_weights import PackWeights
from rdoq_onnx.passes.packing.shorten_names import ShortenNames
from rdoq_onnx.system import io
from tests.passes.packing.test_pack_vectors import network

WEIGHTS = ("w0", "w1", "w2")
STEPS = {
    "packed": [PackWeights(WEIGHTS), PackVectors(())],
    "native": [PackWeights(WEIGHTS, "native"), PackVectors(())],
    "int8": [],
}


@pytest.mark.parametrize("storage", STEPS)
def test_storage_with_external_data(ort_run, monkeypatch, tmp_path, storage):
    model, _, feeds = network()
    expected = ort_run(model, feeds, "all")[0]
    monkeypatch.setattr(sizes, "_SERIALIZABLE", 8_000)
    monkeypatch.setattr(io, "LIMIT", 8_000)
    checked = []
    check_model = onnx.checker.check_model
    with monkeypatch.context() as patch:
        patch.setattr(onnx.checker, "check_model", lambda m: (checked.append(m.ByteSize()), check_model(m))[1])
        small = run_passes([*STEPS[storage], ShortenNames(["x", "y"])], model)
    assert len(checked) == 2 + len(STEPS[storage])
    assert max(checked) < 16_000, "the checker serialises what it is given"
    path = tmp_path / "large.onnx"
    io.write_model(small, path)
    (data,) = tmp_path.glob("large.onnx.*.data")
    assert path.stat().st_size < 16_000 < data.stat().st_size
    read = io.read_model(path)
    assert {t.data_type for t in read.graph.initializer} == {t.data_type for t in small.graph.initializer}
    assert (TensorProto.INT4 in {t.data_type for t in read.graph.initializer}) == (storage == "native")
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, feeds)
    np.testing.assert_array_equal(got, expected)

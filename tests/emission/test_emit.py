"""The emitted file of an allocation: its metadata, the storage of its weights, the removed channels."""

import json

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.api import allocate, measure
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.config import Config
from rdoq_onnx.emission.emit import emit_model, recorded_settings
from rdoq_onnx.model.cost_rows import Amount, preset
from rdoq_onnx.version import __version__

X = np.random.default_rng(0).standard_normal((12, 3, 6, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def allocation():
    """Two convolutions, with channels 1 to 8 of the first at 0 bits."""
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 3, 6, 6] x) => (float[N, 4, 6, 6] y)
        { [one] a = Conv (x, w) b = Relu (a) [two] y = Conv (b, v) }""")
    rng = np.random.default_rng(1)
    weights = {"w": rng.standard_normal((16, 3, 1, 1)), "v": rng.standard_normal((4, 16, 1, 1))}
    model.graph.initializer.extend(numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items())
    return allocate(measure(model, {"x": X}, threads=1), weight_bits=4, activation_bits=8, pins=[("one[1:9]", 0)])


def metadata(emission):
    return {entry.key: entry.value for entry in emission.model.metadata_props}


def test_the_file_records_how_it_was_made(allocation):
    entries = metadata(emit_model(allocation, {"b": 1, "a": [2]}, "int8"))
    assert entries["rdoq_onnx.version"] == __version__
    assert entries["rdoq_onnx.settings"] == '{"a":[2],"b":1}'


def test_0_bit_channels_are_removed_unless_kept(allocation):
    emission, kept = (emit_model(allocation, {}, "int8", keep_channels=k) for k in (False, True))
    assert emission.removed == {"one": tuple(range(1, 9))}
    assert not kept.removed
    assert sum(t.dims[0] == 8 for t in emission.model.graph.initializer if len(t.dims) == 4) == 1
    assert sum(t.dims[0] == 16 for t in kept.model.graph.initializer if len(t.dims) == 4) == 1


def test_every_storage_computes_the_same(allocation, ort_run):
    plain = ort_run(emit_model(allocation, {}, "int8").model, {"x": X})[0]
    for storage in ("packed", None):
        emission = emit_model(allocation, {}, storage)
        assert emission.storage == "packed"  # the default of ONNX Runtime
        np.testing.assert_array_equal(ort_run(emission.model, {"x": X})[0], plain)


def test_settings_name_samples_by_their_content():
    samples = Samples("a.npz", {"x": X})
    settings = recorded_settings(Config(provider="cpu"), samples)
    assert settings == recorded_settings(Config(provider="auto"), Samples("b.npz", {"x": X.copy()}))
    assert settings["calibration"] == f"sha256:{samples.digest}"
    assert settings["samples"] == 12
    assert recorded_settings(Config(), Samples("synthetic", {"x": X}))["calibration"] == "synthetic"
    json.dumps(settings)


def test_costs_are_recorded_where_they_decide():
    """Beside a budget or a goal, not where they are only reported."""
    samples, cost = Samples("a.npz", {"x": X}), preset("bops")
    assert recorded_settings(Config(cost=cost, sqnr=20.0), samples)["cost"] == "bops"
    assert recorded_settings(Config(cost=cost, budget=Amount(9)), samples)["cost"] == "bops"
    assert recorded_settings(Config(cost=cost), samples) == recorded_settings(Config(), samples)

"""What a measurement is bound to: what the tensors hold, not where; samples, settings, version."""

import numpy as np
import onnx
from onnx import numpy_helper, parser

from rdoq_onnx.curves import binding
from rdoq_onnx.curves.binding import Binding
from rdoq_onnx.model import external
from rdoq_onnx.model.external import Shelf

SETTINGS = {"widths": (2, 4), "seed": 0}


def network(values):
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => (float[N] y) { y = Mul (x, w) }'
    )
    model.graph.initializer.append(numpy_helper.from_array(values, "w"))
    return model


def test_each_part_counts(monkeypatch):
    values = np.arange(5, dtype=np.float32)
    given = [
        (network(values), "samples", SETTINGS),
        (network(values + 1), "samples", SETTINGS),
        (network(values), "others", SETTINGS),
        (network(values), "samples", SETTINGS | {"seed": 1}),
    ]
    identities = [Binding.of(*each).identity for each in given]
    assert len(set(identities)) == 4
    assert Binding.of(*given[0]).identity == identities[0]
    monkeypatch.setattr(binding, "VERSION", 0)
    assert Binding.of(*given[0]).identity not in identities


def test_settings_are_as_json_reads_them():
    assert Binding.of(network(np.ones(1, "f")), "samples", SETTINGS).settings == {"widths": [2, 4], "seed": 0}


def test_detached_values_count_wherever_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(external, "DETACHED", 1)
    (tmp_path / "other").mkdir()
    values = np.arange(1 << 15, dtype=np.float32)
    models = [Shelf(lambda folder=f: folder).detached(network(values)) for f in (tmp_path, tmp_path / "other")]
    changed = Shelf(lambda: tmp_path).detached(network(values + 1))
    assert all(map(external.is_detached, [*models, changed]))
    first, second, third = (Binding.of(m, "samples", SETTINGS).model for m in (*models, changed))
    assert first == second != third
    renamed = onnx.ModelProto()
    renamed.CopyFrom(models[0])
    renamed.graph.node[0].name = "n"
    assert Binding.of(renamed, "samples", SETTINGS).model != first

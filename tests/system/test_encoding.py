"""Dataclasses to JSON and arrays and back; only listed classes are ever instantiated."""

import json

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.model.codes import Affine, WeightCodes
from rdoq_onnx.system.encoding import decode, encode, model_parts
from rdoq_onnx.system.progress import Progress

CLASSES = {c.__name__: c for c in (Affine, WeightCodes)}
TEXT = """<ir_version: 8, opset_import: ["": 17]> g (float[N,3] x) => (float[N,3] y) { y = Mul (x, w) }"""


def test_round_trip():
    codes = WeightCodes(np.array([[1, -2]], np.int8), np.array([0.5], np.float32))
    value = {"a": (1, 2.5, None, "text", True), 4: codes, "q": Affine(0.1, 3, 0, 15), "n": np.int64(7)}
    arrays = []
    tree = json.loads(json.dumps(encode(value, arrays, CLASSES)))
    again = decode(tree, arrays, CLASSES)
    assert again["a"] == value["a"]
    assert (again["q"], again["n"]) == (value["q"], 7)
    np.testing.assert_array_equal(again[4].integers, codes.integers)
    model = parser.parse_model(TEXT)
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3), "w"))
    assert decode(encode(model, arrays, CLASSES), arrays, CLASSES) == model


def test_only_listed_classes_are_instantiated():
    with pytest.raises(TypeError, match="Progress"):
        encode(Progress(), [], CLASSES)
    for tree in ({"Progress": {}}, {"array": 3}, {"Affine": {"nonsense": 1}}, {"tuple": 3}):
        with pytest.raises((KeyError, IndexError, TypeError, ValueError)):
            decode(tree, [], CLASSES)


@pytest.mark.parametrize("parts", [[], [b"\xff\xff"], [b"", b"\xff"]])
def test_bytes_other_than_a_model_are_refused(parts):
    arrays = [np.frombuffer(part, np.uint8) for part in parts]
    with pytest.raises((ValueError, IndexError)):
        decode({"model": [{"array": k} for k in range(len(parts))]}, arrays, CLASSES)


def test_weights_are_separate_from_their_model():
    model = parser.parse_model(TEXT)
    model.graph.initializer.append(numpy_helper.from_array(np.ones(1000), "w"))
    shell, weight = model_parts(model)
    assert len(shell) < 200
    assert len(weight) > 8000
    assert len(model.graph.initializer) == 1

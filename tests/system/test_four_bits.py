"""The file of ONNX Runtime's own 4-bit quantizer."""

import logging
import subprocess

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.system.four_bits import four_bits


def model():
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[N, 64] x) => (float[N, 8] y) { y = MatMul (x, w) }'
    parsed = parser.parse_model(text)
    weight = np.random.default_rng(0).standard_normal((64, 8), np.float32)
    parsed.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return parsed


def test_products_have_four_bits_and_logging_stays():
    handlers = list(logging.getLogger().handlers)
    found = four_bits(model())
    assert [n.op_type for n in found.graph.node] == ["MatMulNBits"]
    assert logging.getLogger().handlers == handlers


@pytest.mark.parametrize("error", [subprocess.CalledProcessError(1, "python"), OSError("no memory")])
def test_without_the_quantizer_there_is_none(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(subprocess, "run", fail)
    assert four_bits(model()) is None

"""Held-out samples that are too like those seen."""

from dataclasses import replace

import numpy as np
import pytest
from onnx import numpy_helper, parser

import rdoq_onnx
from rdoq_onnx.report.causes import alike


def run(samples: np.ndarray):
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 32] x) => (float[N, 64] y) { a = MatMul (x, w) y = Tanh (a) }"""
    )
    weight = 0.1 * np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return rdoq_onnx.quantize(model, {"x": samples.astype(np.float32)}, effort="fast", bits=6).report


def test_samples_of_a_wide_source_are_far_apart():
    report = run(np.random.default_rng(1).standard_normal((48, 32)))
    assert 0.5 < report.likeness <= 1
    assert alike(report) == []


def test_samples_around_few_are_alike():
    rng = np.random.default_rng(1)
    report = run(np.repeat(rng.standard_normal((6, 32)), 8, axis=0) + 0.1 * rng.standard_normal((48, 32)))
    assert report.likeness < 0.2
    (line,) = alike(report)
    assert "promise little" in line
    assert line in report.advice


@pytest.mark.parametrize("samples", [80])
def test_fewer_outputs_than_samples_say_nothing(samples):
    report = run(np.random.default_rng(1).standard_normal((samples, 32)))
    assert report.likeness is None
    assert alike(replace(report, likeness=None)) == []

"""Sizes from shape inference are those that a pass over the samples observes."""

import numpy as np
import pytest

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.normalization import read_normalized
from rdoq_onnx.config import Config
from rdoq_onnx.curves.measurement import aimed_at
from rdoq_onnx.estimate.sizes import inferred, inner
from rdoq_onnx.observation.batching import Batching
from rdoq_onnx.observation.inputs import batched, samples_for
from rdoq_onnx.observation.observe import observe
from rdoq_onnx.observation.parts import find_parts, measured_tensors
from rdoq_onnx.system.runtime import Runtime
from tests.analysis.test_analyse import parse
from tests.conftest import ROOT
from tests.genai import genai_decoder


@pytest.mark.parametrize("name", ["digits_cnn", "digits_vit", "plays_decoder_cached", "fused decoder"])
def test_agree_with_a_pass(name):
    config, runtime = Config(samples=16), Runtime("cpu", 1)
    source = genai_decoder() if name == "fused decoder" else ROOT / "models" / f"{name}.onnx"
    model = read_normalized(source)[1]
    network = analyse(model, config.selection)
    calibration = ROOT / "models" / f"{'digits' if 'digits' in name else 'plays'}_calib.npz"
    samples = batched(network, model, samples_for(model, calibration, config), runtime)
    parts = find_parts(model)
    aimed = aimed_at(network, measured_tensors(parts))
    observed, found = observe(aimed, parts, samples, runtime), inferred(aimed, parts, samples, runtime)
    assert found.sizes == observed.sizes
    assert found.batching == observed.batching
    assert found.metric.elements == observed.metric.elements
    assert inner(aimed, samples, found, runtime) >= sum(observed.sizes.values())


def test_average_samples_of_several_shapes():
    model = parse("agraph (float[N, T, 8] x) => (float[N, T, 4] y) { y = MatMul(x, w) }", w=(8, 4))
    arrays = [{"x": np.ones((count, length, 8), np.float32)} for count, length in ((6, 2), (2, 6))]
    config, parts = Config(activation_bits=None), find_parts(model)
    feeds = [{"x": group["x"][k : k + 1]} for group in arrays for k in range(len(group["x"]))]
    samples = samples_for(model, feeds, config)
    found = inferred(analyse(model, config.selection), parts, samples, Runtime("cpu", 1))
    assert found.sizes == {"x": 24, "y": 12}
    assert found.batching.peak == pytest.approx(2)


def test_a_fixed_batch_is_not_stacked():
    model = parse("agraph (float[4, 8] x) => (float[4, 2] y) { y = MatMul(x, w) }", w=(8, 2))
    config = Config(activation_bits=None)
    samples = samples_for(model, {"x": np.ones((8, 8), np.float32)}, config)
    found = inferred(analyse(model, config.selection), find_parts(model), samples, Runtime("cpu", 1))
    assert found.sizes == {"x": 8, "y": 2}
    assert found.batching == Batching(4, stackable=False)

"""Comparing quantized models of any tool with the float one."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

import rdoq_onnx
from rdoq_onnx.errors import ModelError
from tests.conftest import ROOT

CNN, TEST = ROOT / "models" / "digits_cnn.onnx", ROOT / "models" / "digits_test.npz"


def noisy(scale):
    model = onnx.load(CNN)
    rng = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype == np.float32 and value.ndim > 1:
            value = value + scale * rng.standard_normal(value.shape, np.float32) * value.std()
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return model


def test_figures_are_those_of_the_outputs(ort_run):
    other = noisy(0.05)
    found = rdoq_onnx.compare(CNN, other, TEST, samples=200, threads=1)
    with np.load(TEST) as data:
        order = np.linspace(0, len(data["x"]) - 1, 200).round().astype(int)
        x = ((data["x"] / np.float32(255) - data["mean"]) / data["std"]).transpose(0, 3, 1, 2)[order].astype(np.float32)
    (before,), (after,) = (ort_run(model, {"input": x}) for model in (onnx.load(CNN), other))
    assert found.samples == 200
    assert found.sqnr_db == pytest.approx(10 * np.log10((before**2).sum() / ((before - after) ** 2).sum()), abs=0.2)
    assert found.agreement.share == pytest.approx((before.argmax(1) == after.argmax(1)).mean(), abs=0.02)
    assert found.agreement.accuracy is not None
    assert found.divergence > 0
    assert found.worst.bound_db < found.sqnr_db
    assert repr(found).startswith(f"Comparison({found.sqnr_db:.2f} dB on 200 samples")


def test_more_noise_is_less_sqnr():
    one, other = (rdoq_onnx.compare(CNN, noisy(scale), TEST, samples=50, threads=1) for scale in (0.02, 0.2))
    assert one.sqnr_db > other.sqnr_db + 10


MODEL = '<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] {}) => (float[N, {}] {}) {{ {} }}'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (("z", 4, "y", "y = MatMul (z, w)"), "the inputs of the two models differ in 'x', 'z'"),
        (("x", 4, "z", "z = MatMul (x, w)"), "the quantized model has no output 'y'"),
        (("x", 8, "y", "m = MatMul (x, w) y = Concat <axis = 1> (m, m)"), "an output has the shapes"),
    ],
)
def test_models_that_do_not_belong_together_are_refused(text, reason):
    def parsed(fields):
        model = parser.parse_model(MODEL.format(*fields))
        model.graph.initializer.append(numpy_helper.from_array(np.eye(4, dtype=np.float32), "w"))
        return model

    float_model = parsed(("x", 4, "y", "y = MatMul (x, w)"))
    with pytest.raises(ModelError, match=reason):
        rdoq_onnx.compare(float_model, parsed(text), {"x": np.ones((4, 4), np.float32)}, threads=1)

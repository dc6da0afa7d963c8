"""Every form of a layer through the whole program: quantized at 8 bits it gives what the float model gives."""

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser

import rdoq_onnx
from rdoq_onnx.observation.distortion import sqnr_db
from tests.conftest import OrtRun

# Signature and body of a model, and the shapes of its weights.
FORMS: dict[str, tuple[str, dict[str, list[int]]]] = {
    "conv 1d": ("(float[N,3,12] x) => (y) { y = Conv<pads=[2,0]>(x, w) }", {"w": [4, 3, 3]}),
    "conv 2d asymmetric": (
        "(float[N,3,8,9] x) => (y) { y = Conv<pads=[1,0,2,1], strides=[2,1]>(x, w) }",
        {"w": [4, 3, 3, 3]},
    ),
    "conv 2d dilated groups": (
        "(float[N,4,9,9] x) => (y) { y = Conv<group=2, dilations=[2,1]>(x, w, b) }",
        {"w": [6, 2, 3, 3], "b": [6]},
    ),
    "conv 2d depthwise same": (
        '(float[N,4,9,9] x) => (y) { y = Conv<group=4, auto_pad="SAME_LOWER">(x, w) }',
        {"w": [4, 1, 4, 4]},
    ),
    "conv 3d": ("(float[N,2,5,6,5] x) => (y) { y = Conv<strides=[2,1,1]>(x, w) }", {"w": [3, 2, 2, 3, 2]}),
    "transposed": (
        "(float[N,4,5,6] x) => (y) { y = ConvTranspose<strides=[2,2], output_padding=[1,0]>(x, w) }",
        {"w": [4, 3, 3, 3]},
    ),
    "transposed groups": (
        "(float[N,4,7] x) => (y) { y = ConvTranspose<group=2, strides=[2]>(x, w, b) }",
        {"w": [4, 3, 3], "b": [6]},
    ),
    "transposed to a shape": (
        "(float[N,4,4] x) => (y) { y = ConvTranspose<strides=[2], output_shape=[8]>(x, w) }",
        {"w": [4, 3, 3]},
    ),
    "gemm": ("(float[N,6] x) => (y) { y = Gemm<alpha=0.5, beta=2.0>(x, w, b) }", {"w": [6, 5], "b": [5]}),
    "gemm transposed": ("(float[N,6] x) => (y) { y = Gemm<transB=1>(x, w, b) }", {"w": [5, 6], "b": [1, 5]}),
    "gemm, both transposed": (
        "(float[6,4] x) => (y) { y = Gemm<transA=1, transB=1, beta=0.5>(x, w, b) }",
        {"w": [5, 6], "b": [1]},
    ),
    "gemm without use of its bias": ("(float[N,6] x) => (y) { y = Gemm<beta=0.0>(x, w, b) }", {"w": [6, 5], "b": [5]}),
    "matmul, left": ("(float[6,4] x) => (y) { y = MatMul(w, x) }", {"w": [5, 6]}),
    "matmul, left of a stack": ("(float[N,6,4] x) => (y) { y = MatMul(w, x) }", {"w": [5, 6]}),
    "matmul, stacked data": ("(float[N,2,3,6] x) => (y) { y = MatMul(x, w) }", {"w": [6, 5]}),
    "matmul of a vector": ("(float[6] x) => (y) { y = MatMul(x, w) }", {"w": [6, 5]}),
    "batch of one": ("(float[1,3,6] x) => (y) { y = MatMul(x, w) }", {"w": [6, 5]}),
    "axis 0 is no batch": (
        "(float[3,6] x) => (y) { m = ReduceMean<axes=[0]>(x) d = Sub(x, m) y = MatMul(d, w) }",
        {"w": [6, 5]},
    ),
    "sequence before batch": (
        "(float[5,2,6] x) => (y) { t = Transpose<perm=[1,0,2]>(x) y = MatMul(t, w) }",
        {"w": [6, 5]},
    ),
    "shared kernel at two strides and pads": (
        "(float[N,2,16] x) => (y, z) { y = Conv(x, w, b) z = Conv<strides=[2], pads=[1,1]>(x, w, c) }",
        {"w": [3, 2, 3], "b": [3], "c": [3]},
    ),
    "shared weight": (
        "(float[N,6] x, float[N,6] z) => (y) { a = MatMul(x, w) b = MatMul(z, w) y = Sub(a, b) }",
        {"w": [6, 5]},
    ),
}


def model_of(form: str) -> onnx.ModelProto:
    text, shapes = FORMS[form]
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {text}')
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    model.graph.initializer.extend(numpy_helper.from_array(w, name) for name, w in weights.items())
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def feeds_of(model: onnx.ModelProto, seed: int) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    shapes = {i.name: [d.dim_value or 1 for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_quantized_and_gives_what_the_float_model_gives(form: str, ort_run: OrtRun) -> None:
    model = model_of(form)
    samples: list[Any] = [feeds_of(model, seed) for seed in range(12)]
    result = rdoq_onnx.quantize(model, samples, bits=8, effort="fast", threads=1)
    assert result.report.skipped == ()
    assert "w" not in {t.name for t in result.model.graph.initializer}
    signal = noise = 0.0
    for feeds in samples:
        for got, expected in zip(ort_run(result.model, feeds), ort_run(model, feeds), strict=True):
            signal += float(np.square(expected).sum())
            noise += float(np.square(got - expected).sum())
    assert sqnr_db(signal, noise) > 20

"""Scales of blocks: the file multiplies each weight by that of its block, in every runtime and storage."""

import numpy as np
import pytest
from onnx import TensorProto, numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.normalization import NORMALIZE
from rdoq_onnx.candidates.quantizer import quantize_blocks
from rdoq_onnx.config import Config
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.insert_qdq import InsertQDQ, QuantizedWeight
from rdoq_onnx.passes.packing.pack_vectors import PackVectors
from rdoq_onnx.passes.packing.pack_weights import PackWeights
from rdoq_onnx.passes.replace_weights import ReplaceWeights
from rdoq_onnx.system import openvino_runtime
from tests.conftest import LEVELS, deviation

# Each with the number of blocks of a row, and the shapes of weights.
LAYERS = {
    "MatMul": ("(float[3, 48] x) => (float[3, 5] y) { y = MatMul (x, w) }", 3, (48, 5)),
    "left MatMul": ("(float[48, 3] x) => (float[5, 3] y) { y = MatMul (w, x) }", 3, (5, 48)),
    "Gemm": ("(float[3, 48] x) => (float[3, 5] y) { y = Gemm (x, w) }", 4, (48, 5)),
    "transposed Gemm": ("(float[3, 48] x) => (float[3, 5] y) { y = Gemm <transB = 1> (x, w) }", 2, (5, 48)),
    "Conv": ("(float[2, 16, 5, 5] x) => (float[2, 4, 3, 3] y) { y = Conv (x, w) }", 9, (4, 16, 3, 3)),
    "two": ("(float[3, 48] x) => (float[3, 5] y) { a = MatMul (x, w) b = MatMul (x, v) y = Sub (a, b) }", 6, (48, 5)),
}


def models(text, count, shape, bits):
    """The file with `count` scales for each channel, what it should compute, and feeds."""
    rng = np.random.default_rng(0)
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {text}')
    for name in ("w", "v"):
        if any(name in n.input for n in model.graph.node):
            model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape, np.float32), name))
    network = analyse(run_passes(NORMALIZE, model), Config(activation_bits=None).selection)
    tensors = {t.name: numpy_helper.to_array(t) for t in network.model.graph.initializer}
    weights, floats = [], []
    for layer in network.layers:
        rows = layer.linear.rows(tensors[layer.weight])
        codes = quantize_blocks(rows, bits, 127, rows.shape[1] // count)
        assert codes.scales.shape == (len(rows), count)
        assert (codes.scales < 0).any()
        shift = np.zeros(len(rows))
        weights.append(QuantizedWeight(layer, layer.linear.tensor(codes.integers), codes.scales, shift))
        floats.append((layer, layer.linear.tensor(codes.values), shift))
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in network.model.graph.input}
    feeds = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    emitted = run_passes([InsertQDQ(weights, [])], network.model)
    return emitted, run_passes([ReplaceWeights(floats)], network.model), feeds


@pytest.mark.parametrize("storage", ["int8", "packed", "native"])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_runtime_decodes_the_same_weights(kind, storage, ort_run):
    emitted, expected, feeds = models(*LAYERS[kind], bits=3)
    if storage != "int8":
        names = [t.name for t in emitted.graph.initializer if t.data_type == TensorProto.INT8]
        vectors = [t.name for t in emitted.graph.initializer if t.name not in names]
        emitted = run_passes([PackWeights(names, storage, int2=False), PackVectors(vectors)], emitted)
        scales = [t for t in emitted.graph.initializer if t.data_type == TensorProto.FLOAT16]
        assert scales, "float16 holds the scales"
        assert not any(t.data_type == TensorProto.FLOAT and len(t.dims) > 1 for t in emitted.graph.initializer)
    (value,) = ort_run(expected, feeds, "none")
    runs = {level: ort_run(emitted, feeds, level) for level in LEVELS}
    runs["reference evaluator"] = ReferenceEvaluator(emitted).run(None, feeds)
    if openvino_runtime.installed():
        runs["OpenVINO"] = list(openvino_runtime.load(emitted).run(feeds).values())
    for where, outputs in runs.items():
        assert deviation(outputs, [value]) < 1e-5, where


def test_layers_of_one_shape_share_the_numbers():
    emitted, _, _ = models(*LAYERS["two"], bits=4)
    numbers = [t for t in emitted.graph.initializer if t.data_type == TensorProto.UINT8]
    assert [numpy_helper.to_array(t).tolist() for t in numbers] == [np.repeat(np.arange(6), 8).tolist()]


@pytest.mark.parametrize("kind", LAYERS)
def test_a_channel_is_packed_at_its_width(kind, monkeypatch):
    """Windows of all blocks are the same, so a channel takes no more bits than a block."""
    monkeypatch.setattr("rdoq_onnx.passes.packing.bit_rows._GROUP_NODES", -10_000)
    emitted, _, _ = models(*LAYERS[kind], bits=2)
    names = [t.name for t in emitted.graph.initializer if t.data_type == TensorProto.INT8]
    packed = run_passes([PackWeights(names)], emitted)
    rows = sum(t.dims[0] for t in packed.graph.initializer if t.name.startswith("packed_") and "bits" not in t.name)
    assert rows == max(-(-2 * sum(4 if kind == "Conv" else 5 for _ in names) // 8), 2)

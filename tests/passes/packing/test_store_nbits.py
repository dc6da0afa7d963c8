"""nbits storage: MatMulNBits computes what the packed file does, within the error of its rounded activations."""

import numpy as np
import pytest
from onnx import TensorProto, numpy_helper, parser

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.normalization import NORMALIZE
from rdoq_onnx.candidates.quantizer import quantize_blocks, quantize_rows
from rdoq_onnx.config import Config
from rdoq_onnx.model.codes import WeightCodes
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.insert_qdq import InsertQDQ, QuantizedWeight
from rdoq_onnx.passes.packing.store_nbits import StoreNBits, stored_integers
from rdoq_onnx.passes.quantize_stored import QuantizeStored, StoredWeight
from tests.conftest import LEVELS

ROUNDED = 0.012  # relative error of activations of 8 bits a block
MATMUL = "(float[5, K] x) => (float[5, 24] y) { [m] y = MatMul (x, w) }"


def emitted(text, inputs, widths, block=0):
    """A file with weights [inputs, 24] whose channels have `widths` in turn, and feeds."""
    rng = np.random.default_rng(0)
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {text.replace("K", str(inputs), 1)}')
    weight = rng.standard_normal((inputs, 24), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    network = analyse(run_passes(NORMALIZE, model), Config(activation_bits=None).selection)
    (layer,) = network.layers
    rows = layer.linear.rows(numpy_helper.to_array(network.model.graph.initializer[0]))
    made = {b: quantize_blocks(rows, b, 127, block) if block else quantize_rows(rows, b, 127) for b in set(widths)}
    each = [widths[k % len(widths)] for k in range(24)]
    codes = WeightCodes(
        np.stack([made[b].integers[k] for k, b in enumerate(each)]),
        np.stack([made[b].scales[k] for k, b in enumerate(each)]),
    )
    weights = [QuantizedWeight(layer, layer.linear.tensor(codes.integers), codes.scales, np.zeros(24))]
    return run_passes([InsertQDQ(weights, [])], network.model), {"x": rng.standard_normal((5, inputs), np.float32)}


def operators(model):
    return [n.op_type for n in model.graph.node]


def error(got, expected):
    return np.linalg.norm(got[0] - expected[0]) / np.linalg.norm(expected[0])


@pytest.mark.parametrize("inputs", [16, 64, 100, 300, 576])
@pytest.mark.parametrize("widths", [(2,), (4,), (8,), (2, 4, 8), (0, 4), (3, 5)], ids=str)
def test_numbers_are_those_of_the_packed_file(inputs, widths, ort_run):
    model, feeds = emitted(MATMUL, inputs, widths)
    found = run_passes([StoreNBits()], model)
    expected = ort_run(model, feeds, "all")
    for level in LEVELS:
        assert error(ort_run(found, feeds, level), expected) < ROUNDED, level


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("widths", [(2,), (4,), (2, 4, 8)], ids=str)
def test_scales_of_blocks(block, widths, ort_run):
    model, feeds = emitted(MATMUL, 256, widths, block)
    found = run_passes([StoreNBits()], model)
    assert "Gather" not in operators(found) or len(widths) > 1
    assert error(ort_run(found, feeds, "all"), ort_run(model, feeds, "all")) < ROUNDED


def test_one_width_is_one_node_and_several_are_brought_into_order():
    assert operators(run_passes([StoreNBits()], emitted(MATMUL, 64, (4,))[0])) == ["MatMulNBits"]
    several = run_passes([StoreNBits()], emitted(MATMUL, 64, (2, 4, 8))[0])
    assert operators(several) == ["MatMulNBits", "MatMulNBits", "MatMulNBits", "Concat", "Gather"]
    assert several.graph.node[-1].name == "m"
    assert [(o.domain, o.version) for o in several.opset_import if o.domain] == [("com.microsoft", 1)]


@pytest.mark.parametrize("widths", [(2,), (0, 2, 4, 8)], ids=str)
def test_integers_can_be_read_back(widths):
    model, _ = emitted(MATMUL, 100, widths)
    before = next(numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == TensorProto.INT8)
    found = run_passes([StoreNBits()], model)
    node = next(n for n in found.graph.node if n.name == "m")
    np.testing.assert_array_equal(np.abs(stored_integers(node, found.graph)), np.abs(before))
    assert stored_integers(model.graph.node[0], model.graph) is None


def test_weights_take_their_bits():
    found = run_passes([StoreNBits()], emitted(MATMUL, 256, (4,))[0])
    (data,) = [t for t in found.graph.initializer if t.data_type == TensorProto.UINT8]
    assert np.prod(data.dims) == 24 * 256 // 2


TABLE = """<ir_version: 8, opset_import: ["": 17]> g (int64[5] i) => (float[5, K] y) { [t] y = Gather (table, i) }"""


def table(columns, bits):
    """A file that looks up rows of a table [40, columns], and the float table that it stands for."""
    model = parser.parse_model(TABLE.replace("K", str(columns)))
    value = np.random.default_rng(1).standard_normal((40, columns), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(value, "table"))
    codes = quantize_rows(value, bits, 127)
    stored = StoredWeight("table", codes.integers, codes.scales[:, None])
    return run_passes([QuantizeStored([stored])], model), codes


@pytest.mark.parametrize("columns", [16, 64, 100, 300])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_rows_of_tables_stay_packed(columns, bits, ort_run):
    model, codes = table(columns, bits)
    found = run_passes([StoreNBits()], model)
    assert operators(found)[-1] == "GatherBlockQuantized"
    feeds = {"i": np.array([3, 0, 39, 3, 7])}
    for level in LEVELS:
        np.testing.assert_allclose(ort_run(found, feeds, level)[0], codes.values[feeds["i"]], rtol=1e-5, atol=1e-6)
    read = stored_integers(next(n for n in found.graph.node if n.name == "t"), found.graph)
    np.testing.assert_array_equal(np.abs(read), np.abs(codes.integers))


@pytest.mark.parametrize(("columns", "bits"), [(64, 8), (33, 4)])
def test_tables_of_8_bits_or_in_parts_of_bytes_stay(columns, bits):
    model, _ = table(columns, bits)
    assert operators(run_passes([StoreNBits()], model)) == operators(model)


def test_other_operators_and_blocks_stay(ort_run):
    gemm, _ = emitted("(float[5, K] x) => (float[5, 24] y) { [m] y = Gemm (x, w) }", 64, (4,))
    odd, _ = emitted(MATMUL, 96, (4,), 48)
    for model in (gemm, odd):
        assert "MatMulNBits" not in operators(run_passes([StoreNBits()], model))

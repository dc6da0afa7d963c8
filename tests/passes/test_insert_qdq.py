"""The emitted graph: its form in the file, the kernels that ONNX Runtime makes of it, and its numbers."""

from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from onnx import checker, numpy_helper, parser

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.network import Network
from rdoq_onnx.analysis.normalization import NORMALIZE
from rdoq_onnx.candidates.activations import affine
from rdoq_onnx.candidates.quantizer import quantize_rows
from rdoq_onnx.config import Config
from rdoq_onnx.model import surgeon
from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.insert_qdq import InsertQDQ, QuantizedWeight
from rdoq_onnx.system.runtime import Runtime
from tests.conftest import deviation


@dataclass
class Case:
    """A model, its quantized form, and the same computed in float: decoded weights and fake-quantized activations."""

    network: Network
    emitted: onnx.ModelProto
    emulated: onnx.ModelProto
    feeds: dict

    @property
    def kernels(self):
        """How often each operator is in the graph that the default level makes."""
        return count(Runtime("cpu", 1).optimized(self.emitted, "all"))


def count(model):
    types = [n.op_type for n in model.graph.node]
    return {t: types.count(t) for t in sorted(set(types))}


def quantized(
    graph,
    weights,
    ort_run,
    *,
    activation_bits=8,
    weight_bits=5,
    share=1.0,
    shifted=False,
    symmetric=False,
    integer_biases=False,
):
    """weights: shapes, or values. share: of an activation's range that its quantizer covers, for all or by name."""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {graph}')
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        value = rng.standard_normal(shape, np.float32) if isinstance(shape, tuple) else shape
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    model = run_passes(NORMALIZE, model)
    network = analyse(model, Config(activation_bits=activation_bits).selection)
    model = network.model
    feeds = {
        i.name: rng.standard_normal([d.dim_value for d in i.type.tensor_type.shape.dim], np.float32)
        for i in model.graph.input
    }
    names = [a.tensor for a in network.activations]
    values = dict(zip(names, ort_run(with_outputs(model, names), feeds), strict=True)) if names else {}
    activations = []
    for activation in network.activations:
        bits = 8 if activation.fusion else activation_bits
        value = values[activation.tensor]
        covered = share.get(activation.tensor, 1.0) if isinstance(share, dict) else share
        activations.append((activation, affine(covered * min(value.min(), 0), covered * value.max(), bits, symmetric)))
    codes, decoded, shifts = [], {}, {}
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for layer in network.layers:
        rows = quantize_rows(layer.linear.rows(tensors[layer.weight]), weight_bits, 64 if activations else 127)
        outputs = layer.linear.channels * (layer.linear.group if layer.linear.op_type == "ConvTranspose" else 1)
        shift = 0.2 * shifted * rng.standard_normal(outputs)
        codes.append(QuantizedWeight(layer, layer.linear.tensor(rows.integers), rows.scales, shift))
        decoded[layer.weight] = layer.linear.tensor(rows.values)
        behind = {"Conv": 2, "ConvTranspose": 2, "MatMul": 1 - layer.linear.weight_side}.get(layer.linear.op_type, 0)
        shifts |= {use.output: shift.reshape(-1, *[1] * behind).astype(np.float32) for use in layer.uses}
    emitted = run_passes([InsertQDQ(codes, activations, integer_biases)], model)
    return Case(network, emitted, emulation(model, decoded, shifts, activations), feeds)


def emulation(model, decoded, shifts, activations):
    """In float, with neither a Relu removed nor a quantizer repeated: a → clip(round(a / s))·s."""

    def fake(graph, tensor, quantizer):
        def build(source):
            parts = [
                surgeon.constant(surgeon.fresh(graph, "c"), np.array(v, np.float32))
                for v in (quantizer.scale, quantizer.low - quantizer.zero_point, quantizer.high - quantizer.zero_point)
            ]
            ratio = surgeon.append(graph, "Div", [source, parts[0]], "ratio", like=tensor)
            rounded = surgeon.append(graph, "Round", [ratio], "round", like=tensor)
            clipped = surgeon.append(graph, "Clip", [rounded, *parts[1:]], "clip", like=tensor)
            return surgeon.append(graph, "Mul", [clipped, parts[0]], "fake", like=tensor)

        surgeon.insert_after(graph, tensor, build, outputs=False)

    def change(graph):
        tensors = graph.tensors()
        for name, value in decoded.items():
            tensors[name].values = value
        for activation, quantizer in activations:
            fake(graph, tensors[activation.tensor], quantizer)
        for name, value in shifts.items():
            tensor, shift = tensors[name], surgeon.constant(surgeon.fresh(graph, "shift"), value)
            surgeon.insert_after(graph, tensor, lambda t, s=shift: surgeon.append(graph, "Add", [t, s], "a", like=t))

    return surgeon.edit(model, change)


def expect_numbers(case, ort_run, exact=1e-5, tied=0.03):
    """The file computes what was measured; integer kernels may round a tie the other way."""
    expected = ort_run(case.emulated, case.feeds, "none")
    assert deviation(ort_run(case.emitted, case.feeds, "none"), expected) < exact
    assert deviation(ort_run(case.emitted, case.feeds, "basic"), expected) < tied
    assert deviation(ort_run(case.emitted, case.feeds, "all"), expected) < tied


CONVS = """g (float[2, 3, 8, 8] x) => (float[2, 4, 8, 8] y)
    { z1 = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) a1 = Relu (z1)
      z2 = Conv <pads = [1, 1, 1, 1], group = 6> (a1, w2, b2) a2 = Clip (z2, low, high)
      y = Conv (a2, w3) }"""
CONVS_WEIGHTS = {
    "w1": (6, 3, 3, 3),
    "b1": (6,),
    "w2": (6, 1, 3, 3),
    "b2": (6,),
    "w3": (4, 6, 1, 1),
    "low": np.float32(0),
    "high": np.float32(6),
}
RESIDUAL = """g (float[2, 3, 8, 8] x) => (float[2, 4] y)
    { z1 = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) a1 = Relu (z1)
      z2 = Conv <pads = [1, 1, 1, 1]> (a1, w2, b2) r = Add (z2, a1) a2 = Relu (r)
      z3 = Conv (a2, w3) a3 = Relu (z3)
      p = GlobalAveragePool (a3) f = Flatten (p) y = Gemm <transB = 1> (f, w4, b4) }"""
RESIDUAL_WEIGHTS = {
    "w1": (6, 3, 3, 3),
    "b1": (6,),
    "w2": (6, 6, 3, 3),
    "b2": (6,),
    "w3": (5, 6, 1, 1),
    "w4": (4, 5),
    "b4": (4,),
}
FIRE = """g (float[2, 3, 9, 9] x) => (float[2, 5, 3, 3] y)
    { z1 = Conv (x, w1, b1) a1 = Relu (z1) m = MaxPool <kernel_shape = [3, 3], strides = [2, 2]> (a1)
      e1 = Conv (m, w2) e3 = Conv <pads = [1, 1, 1, 1]> (m, w3) r1 = Relu (e1) r3 = Relu (e3)
      c = Concat <axis = 1> (r1, r3) y = Conv (c, w4) }"""
FIRE_WEIGHTS = {
    "w1": (6, 3, 3, 3),
    "b1": (6,),
    "w2": (4, 6, 1, 1),
    "w3": (4, 6, 3, 3),
    "w4": (5, 8, 1, 1),
}
MIXED = """g (float[2, 3, 6, 6] x) => (float[2, 5, 6, 6] y, float[2, 5, 6, 6] t)
    { z1 = Conv (x, w1) z2 = Conv (x, w2) a1 = Relu (z1) a2 = Relu (z2)
      c = Concat <axis = 1> (a1, a2) y = Conv (c, w3) t = Conv (a1, w4) }"""
MIXED_WEIGHTS = {"w1": (4, 3, 1, 1), "w2": (4, 3, 1, 1), "w3": (5, 8, 1, 1), "w4": (5, 4, 1, 1)}
DENSE = """g (float[4, 6] x) => (float[4, 3] y)
    { z = MatMul (x, w1) t = Add (z, b1) a = Relu (t) y = Gemm (a, w2, b2) }"""
DENSE_WEIGHTS = {"w1": (6, 8), "b1": (8,), "w2": (8, 3), "b2": (3,)}
TRANSPOSED = """g (float[2, 3, 4, 4] x) => (float[2, 2, 8, 8] y)
    { z = Conv (x, w1) a = Relu (z) y = ConvTranspose <strides = [2, 2]> (a, w2) }"""
TRANSPOSED_WEIGHTS = {"w1": (4, 3, 1, 1), "w2": (4, 2, 2, 2)}
LEFT = "g (float[2, 6, 5] x) => (float[2, 4, 5] y) { a = Tanh (x) y = MatMul (w, a) }"
SHARED = "g (float[2, 4] x) => (float[2, 4] y) { z = MatMul (x, w) a = Tanh (z) y = MatMul (a, w) }"
NETS = {
    "convolutions": (CONVS, CONVS_WEIGHTS),
    "residual": (RESIDUAL, RESIDUAL_WEIGHTS),
    "fire": (FIRE, FIRE_WEIGHTS),
    "mixed concat": (MIXED, MIXED_WEIGHTS),
    "dense": (DENSE, DENSE_WEIGHTS),
    "transposed": (TRANSPOSED, TRANSPOSED_WEIGHTS),
    "weight on the left": (LEFT, {"w": (4, 6)}),
    "shared weight": (SHARED, {"w": (4, 4)}),
}


@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("net", NETS)
def test_numbers(ort_run, net, bits, share):
    case = quantized(*NETS[net], ort_run, activation_bits=bits, share=share, shifted=share < 1)
    checker.check_model(case.emitted, full_check=True)
    expect_numbers(case, ort_run, tied={8: 0.03, 4: 0.12, 2: 0.3}[bits])


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("net", NETS)
def test_numbers_around_a_zero_point_of_zero(ort_run, net, bits):
    """As TensorRT wants them: INT8, nothing between Q and DQ."""
    case = quantized(*NETS[net], ort_run, activation_bits=bits, share=0.8, symmetric=True)
    checker.check_model(case.emitted, full_check=True)
    expect_numbers(case, ort_run, tied={8: 0.03, 4: 0.12, 2: 0.3}[bits])
    producer = {o: n for n in case.emitted.graph.node for o in n.output}
    for node in case.emitted.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in producer:
            assert producer[node.input[0]].op_type == "QuantizeLinear"
    tensors = {t.name: numpy_helper.to_array(t) for t in case.emitted.graph.initializer}
    zero_points = [tensors[n.input[2]] for n in case.emitted.graph.node if n.op_type.endswith("quantizeLinear")]
    assert all(z.dtype == np.int8 and not z.any() for z in zero_points)


@pytest.mark.parametrize("net", ["convolutions", "residual", "dense"])
def test_integer_biases_are_those_of_the_kernels(ort_run, net):
    """Fused and unfused graphs then differ by rounding ties alone, and biases by half a step."""
    floats, integers = (quantized(*NETS[net], ort_run, shifted=True, integer_biases=stored) for stored in (False, True))
    tensors = {t.name: t for t in integers.emitted.graph.initializer}
    nodes = {n.output[0]: n for n in integers.emitted.graph.node}
    layers = [n for n in integers.emitted.graph.node if n.op_type in ("Conv", "Gemm") and len(n.input) > 2]
    assert layers
    before = {n.name: n for n in floats.emitted.graph.node}
    known = {t.name: numpy_helper.to_array(t) for t in floats.emitted.graph.initializer}
    read_by = {n.input[0]: n.op_type for n in integers.emitted.graph.node if n.input}
    for layer in layers:
        if layer.op_type == "Conv" and read_by.get(layer.output[0]) != "QuantizeLinear":
            assert layer.input[2] in tensors, "a convolution that stays in float has a float bias"
            continue
        q, scale, zero_point = nodes[layer.input[2]].input
        assert tensors[q].data_type == onnx.TensorProto.INT32
        assert nodes[scale].op_type == "Mul"
        zeros = numpy_helper.to_array(tensors[zero_point])
        assert zeros.dtype == np.int32
        assert zeros.shape == tuple(tensors[q].dims)
        assert not zeros.any()
        weight_scale, activation_scale = (numpy_helper.to_array(tensors[i]) for i in nodes[scale].input)
        steps = weight_scale * activation_scale
        bias = known[before[layer.name].input[2]]
        wrong = np.abs(numpy_helper.to_array(tensors[q]) * steps - bias) - steps / 2
        assert (wrong <= np.abs(bias) * 2.0**-11).all(), "half a step, and half precision"
    assert integers.kernels.get("QLinearConv") == floats.kernels.get("QLinearConv")
    assert not {"Gemm", "MatMul", "Mul"} & set(integers.kernels), "also the last Gemm, whose output is float"
    expected = ort_run(floats.emulated, floats.feeds, "none")
    for level in ("none", "basic", "all"):
        assert deviation(ort_run(integers.emitted, integers.feeds, level), expected) < 0.03


@pytest.mark.parametrize("net", NETS)
def test_numbers_with_float_activations(ort_run, net):
    case = quantized(*NETS[net], ort_run, activation_bits=None, shifted=True)
    checker.check_model(case.emitted, full_check=True)
    assert "QuantizeLinear" not in count(case.emitted)
    # ONNX Runtime's MatMulNBits, made of DequantizeLinear and MatMul, rounds activations to 8 bits on its own.
    expect_numbers(case, ort_run, tied=0.01 if "MatMulNBits" in case.kernels else 1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_convolutions_fuse(ort_run, bits):
    case = quantized(CONVS, CONVS_WEIGHTS, ort_run, activation_bits=bits)
    # Relu and Clip are the quantizers' saturation now; a Clip that is left works on integers.
    assert count(case.emitted)["Conv"] == 3
    assert "Relu" not in count(case.emitted)
    assert count(case.emitted).get("Clip", 0) == (0 if bits == 8 else 3)
    # The last convolution has no quantized output, for the graph's outputs stay as they are.
    assert case.kernels["QLinearConv"] == 2
    assert case.kernels["Conv"] + case.kernels.get("FusedConv", 0) == 1


@pytest.mark.parametrize("bits", [8, 4])
def test_residual_network_fuses(ort_run, bits):
    case = quantized(RESIDUAL, RESIDUAL_WEIGHTS, ort_run, activation_bits=bits)
    kernels = case.kernels
    assert kernels["QLinearConv"] == 3
    assert kernels["QLinearAdd"] == 1
    assert kernels["QLinearGlobalAveragePool"] == 1
    # The Gemm gives the graph's output, which is not quantized, so it works in float.
    assert kernels["Gemm"] == 1
    assert not {"Conv", "FusedConv", "Add", "Relu", "GlobalAveragePool"} & set(kernels)


@pytest.mark.parametrize("bits", [8, 4])
def test_concat_and_pool_fuse(ort_run, bits):
    case = quantized(FIRE, FIRE_WEIGHTS, ort_run, activation_bits=bits)
    kernels = case.kernels
    assert kernels["QLinearConv"] == 3
    assert kernels["QLinearConcat"] == 1
    assert kernels.get("MaxPool", 0) + kernels.get("NhwcMaxPool", 0) == 1
    assert "Relu" not in kernels
    assert "Concat" not in kernels
    # All between the input and the last convolution runs on integers.
    assert kernels["QuantizeLinear"] == 1


def test_dense_layers_fuse(ort_run):
    graph = """g (float[4, 6] x) => (float[4, 3] y)
        { z = MatMul (x, w1) t = Add (z, b1) a = Relu (t) u = Gemm (a, w2, b2) v = Relu (u) y = MatMul (v, w3) }"""
    weights = {"w1": (6, 8), "b1": (8,), "w2": (8, 7), "b2": (7,), "w3": (7, 3)}
    case = quantized(graph, weights, ort_run)
    assert case.kernels["QGemm"] == 2
    assert case.kernels["MatMulIntegerToFloat"] == 1
    assert not {"MatMul", "Gemm", "Relu"} & set(case.kernels)
    expect_numbers(case, ort_run)


def test_concat_of_a_part_that_reaches_further(ort_run):
    """a1 has a quantizer of its own, with more room than that of the Concat."""
    case = quantized(MIXED, MIXED_WEIGHTS, ort_run, activation_bits=4, share={"c": 0.3})
    names = [n.input[0] for n in case.emitted.graph.node if n.op_type == "Conv"]
    joined = ort_run(with_outputs(case.emitted, names[2:3]), case.feeds, "none")[0]
    assert joined.shape[1] == 8
    assert len(np.unique(joined)) <= 16
    expect_numbers(case, ort_run, tied=0.12)


def test_relu_stays_for_a_graph_output(ort_run):
    graph = CONVS.replace("(float[2, 4, 8, 8] y)", "(float[2, 4, 8, 8] y, float[2, 6, 8, 8] a1)")
    case = quantized(graph, CONVS_WEIGHTS, ort_run)
    assert count(case.emitted)["Relu"] == 1
    assert [o.name for o in case.emitted.graph.output] == ["y", "a1"]
    expect_numbers(case, ort_run)
    # The output is not quantized itself.
    assert len(np.unique(ort_run(case.emitted, case.feeds)[1])) > 256


def test_relu_stays_for_other_readers(ort_run):
    graph = """g (float[2, 3, 6, 6] x) => (float[2, 4, 6, 6] y, float[2, 4, 6, 6] t)
        { z = Conv (x, w1) a = Relu (z) t = Tanh (z) y = Conv (a, w2) }"""
    case = quantized(graph, {"w1": (4, 3, 1, 1), "w2": (4, 4, 1, 1)}, ort_run)
    assert count(case.emitted)["Relu"] == 1
    expect_numbers(case, ort_run)


CLAMPS = {
    "Relu6": ("a = Clip (z, low, high)", 0.0, 6.0, 0),
    "without an upper bound": ("a = Clip (z, low)", 0.0, 0.0, 0),
    "Relu6, clipped further by the quantizer": ("a = Clip (z, low, high)", 0.0, 1.0, 0),
    "symmetric": ("a = Clip (z, low, high)", -0.5, 0.5, 1),
    "off zero": ("a = Clip (z, low, high)", 0.25, 1.0, 1),
    "computed bound": ("m = ReduceMax <keepdims = 0> (x) a = Clip (z, low, m)", 0.0, 0.0, 1),
    "no bound": ("a = Clip (z)", 0.0, 0.0, 0),
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", CLAMPS)
def test_clip_goes_where_the_quantizer_implies_it(ort_run, kind, bits):
    nodes, low, high, kept = CLAMPS[kind]
    graph = f"g (float[2, 3, 6, 6] x) => (float[2, 4, 6, 6] y) {{ z = Conv (x, w1, b) {nodes} y = Conv (a, w2) }}"
    weights = {"w1": (4, 3, 1, 1), "b": (4,), "w2": (4, 4, 1, 1)}
    weights |= {"low": np.float32(low), "high": np.float32(high)}
    case = quantized(graph, weights, ort_run, activation_bits=bits, share={"a": 0.5 if "further" in kind else 1.0})
    integers = {n.output[0] for n in case.emitted.graph.node if n.op_type == "QuantizeLinear"}
    in_float = [n for n in case.emitted.graph.node if n.op_type == "Clip" and n.input[0] not in integers]
    assert len(in_float) == kept
    expect_numbers(case, ort_run, tied=0.03 if bits == 8 else 0.12)


@pytest.mark.parametrize("bits", [8, 4])
def test_ceiling_for_each_channel_becomes_one_of_the_integers(ort_run, bits):
    graph = """g (float[2, 3, 6, 6] x) => (float[2, 4, 6, 6] y)
        { z = Conv (x, w1, b) r = Relu (z) a = Min (r, caps) y = Conv (a, w2) }"""
    weights = {"w1": (4, 3, 1, 1), "b": (4,), "w2": (4, 4, 1, 1)}
    weights["caps"] = np.array([0.7, 3, 1.2, 60], np.float32).reshape(1, 4, 1, 1)
    case = quantized(graph, weights, ort_run, activation_bits=bits)
    assert "Relu" not in count(case.emitted)
    assert case.kernels["QLinearConv"] == 1
    expect_numbers(case, ort_run, tied={8: 0.03, 4: 0.12}[bits])


def test_activations_take_no_more_levels_than_their_width(ort_run):
    """Every tensor that feeds a layer, in the file as it is."""
    for graph, weights in NETS.values():
        for bits in (4, 2):
            case = quantized(graph, weights, ort_run, activation_bits=bits)
            layers = [n for n in case.emitted.graph.node if n.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
            decoded = {o for n in case.emitted.graph.node if n.op_type == "DequantizeLinear" for o in n.output}
            data = [i for n in layers for i in n.input[:2] if i not in weights]
            assert decoded.issuperset(data)
            names = sorted({i for i in data if not i.startswith("w")})
            for value in ort_run(with_outputs(case.emitted, names), case.feeds, "none"):
                assert len(np.unique(value)) <= 2**bits


@pytest.mark.parametrize("net", NETS)
def test_form_of_the_weights(ort_run, net):
    case = quantized(*NETS[net], ort_run, weight_bits=8)
    tensors = {t.name: numpy_helper.to_array(t) for t in case.emitted.graph.initializer}
    nodes = {n.name: n for n in case.emitted.graph.node}
    producer = {o: n for n in case.emitted.graph.node for o in n.output}
    for layer in case.network.layers:
        decoders = [producer[nodes[u.node].input[layer.linear.weight_side]] for u in layer.uses]
        decoder = decoders[0]
        assert all(d is decoder for d in decoders)
        integers, scales, zero_points = (tensors[i] for i in decoder.input)
        assert decoder.op_type == "DequantizeLinear"
        assert integers.dtype == zero_points.dtype == np.int8
        assert integers.shape == layer.linear.shape
        assert scales.shape == zero_points.shape == (layer.linear.channels,)
        assert not zero_points.any()
        assert layer.weight not in tensors
        (axis,) = (a.i for a in decoder.attribute if a.name == "axis")
        assert axis == layer.linear.axis


def test_each_activation_has_one_scale_wherever_it_goes(ort_run):
    case = quantized(FIRE, FIRE_WEIGHTS, ort_run, activation_bits=4)
    used = {n.input[1] for n in case.emitted.graph.node if n.op_type == "QuantizeLinear"}
    # The input, the pooled activation on both sides of the pool, and the Concat on both sides.
    assert len(used) == 3
    assert count(case.emitted)["QuantizeLinear"] == 1 + 2 + 3


def test_the_given_model_is_not_altered(ort_run):
    case = quantized(CONVS, CONVS_WEIGHTS, ort_run)
    assert count(case.network.model)["Relu"] == 1
    assert "QuantizeLinear" not in count(case.network.model)

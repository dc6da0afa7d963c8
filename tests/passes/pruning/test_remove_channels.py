"""Removing channels of 0 bits: the same outputs from a smaller network, and a reason for each one kept."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, checker, helper, numpy_helper, parser

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.normalization import NORMALIZE
from rdoq_onnx.candidates.activations import affine
from rdoq_onnx.candidates.quantizer import quantize_blocks, quantize_rows
from rdoq_onnx.config import Config
from rdoq_onnx.model.layers import block_sizes
from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.insert_qdq import InsertQDQ, QuantizedWeight
from rdoq_onnx.passes.pruning.remove_channels import RemoveChannels, removable
from tests.conftest import ROOT, deviation, random_feeds

FORMS = ["integers", "floats", "blocks"]
LEVELS = ["none", "basic", "all"]


def emitted(graph, weights, zeros, ort_run, form, *, bits=8, opset=17):
    """A quantized model and feeds. weights: shapes or values. zeros: {weight: {channel of 0 bits: its bias}}."""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> g {graph}')
    rng = np.random.default_rng(0)
    for name, value in weights.items():
        value = rng.standard_normal(value, np.float32) if isinstance(value, tuple) else value
        for channel, bias in zeros.get(f"w{name[1:]}", {}).items():
            if name[0] == "b":
                value[..., channel] = bias
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    feeds = {
        i.name: rng.standard_normal([d.dim_value for d in i.type.tensor_type.shape.dim], np.float32)
        for i in model.graph.input
    }
    return quantized(model, feeds, zeros, ort_run, form, bits), feeds


def quantized(model, feeds, zeros, ort_run, form, bits=8):
    """Weights at 5 bits, or at 0 for the channels in `zeros`, by weight; activations at `bits` or in float.

    form: "blocks" gives channels two or three scales, where they may have them.
    """
    model = run_passes(NORMALIZE, model)
    network = analyse(model, Config(activation_bits=bits if form == "integers" else None).selection)
    model = network.model
    names = [a.tensor for a in network.activations]
    seen = dict(zip(names, ort_run(with_outputs(model, names), feeds), strict=True)) if names else {}
    quantizers = [
        (a, affine(seen[a.tensor].min(), seen[a.tensor].max(), 8 if a.fusion else bits)) for a in network.activations
    ]
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    codes = []
    for layer in network.layers:
        weights = layer.linear.rows(tensors[layer.weight])
        rows = quantize_rows(weights, 5, 64)
        sizes = block_sizes(layer.linear, (weights.shape[1] // 3, weights.shape[1] // 2)) if form == "blocks" else (0,)
        if sizes[0]:
            rows = quantize_blocks(weights, 5, 64, sizes[0])
        rows.integers[list(zeros.get(layer.weight, ()))] = 0
        codes.append(QuantizedWeight(layer, layer.linear.tensor(rows.integers), rows.scales, np.zeros(1)))
    return run_passes([InsertQDQ(codes, quantizers)], model)


def pruned(model, feeds, ort_run, exact=(), unfused=1e-5):
    """The model without what can go, which computes the same.

    exact: levels at which it has to bit for bit. unfused: tolerance where sums in float may round to another integer.
    """
    before = model.SerializeToString()
    removal = removable(model)
    result = run_passes([RemoveChannels(removal)], model)
    assert model.SerializeToString() == before
    checker.check_model(result, full_check=True)
    assert not removable(result).outputs
    for level in LEVELS:
        got, expected = (ort_run(m, feeds, level) for m in (result, model))
        assert all(np.isfinite(e).all() for e in expected)
        assert deviation(got, expected) < (1e-5 if level == "all" else unfused), level
        if level in exact:
            assert all(np.array_equal(g, e) for g, e in zip(got, expected, strict=True))
    return result, removal


def by_output(found, model):
    """{layer: ...} -> {its output: ...}"""
    nodes = {n.name: n for n in model.graph.node}
    return {nodes[name].output[0]: x for name, x in found.items()}


def shapes(model):
    """Of stored weights, by the name of the layer's output."""
    kept = {t.name: tuple(t.dims) for t in model.graph.initializer}
    producer = {o: n for n in model.graph.node for o in n.output}

    def stored(name):
        return kept[name] if name in kept else stored(producer[name].input[0])

    layers = ("Conv", "ConvTranspose", "Gemm", "MatMul")
    return {n.output[0]: stored(n.input[1]) for n in model.graph.node if n.op_type in layers}


CHAIN = "(float[2, 3, 6, 6] x) => (float[2, 4, 6, 6] y) { z = Conv (x, w1, b1) a = Relu (z) y = Conv (a, w2, b2) }"
PADDED = CHAIN.replace("y = Conv", "y = Conv <pads = [1, 1, 1, 1]>")
VALID = CHAIN.replace("[2, 4, 6, 6]", "[2, 4, 4, 4]")
UNBIASED = CHAIN.replace("w2, b2", "w2")
ONE = {"w1": (6, 3, 1, 1), "b1": (6,), "w2": (4, 6, 1, 1), "b2": (4,)}
THREE = ONE | {"w2": (4, 6, 3, 3)}
MOBILE = """(float[2, 3, 8, 8] x) => (float[2, 4, 6, 6] y)
    { z = Conv (x, w1, b1) a = Relu (z) d = Conv <group = 6, pads = [1, 1, 1, 1]> (a, w2, b2) e = Relu (d)
      y = Conv (e, w3, b3) }"""
MOBILE_WEIGHTS = {"w1": (6, 3, 1, 1), "b1": (6,), "w2": (6, 1, 3, 3), "b2": (6,), "w3": (4, 6, 3, 3), "b3": (4,)}
RESIDUAL = """(float[2, 3, 6, 6] x) => (float[2, 4, 6, 6] y)
    { p = Conv (x, w1, b1) q = Conv <pads = [1, 1, 1, 1]> (x, w2, b2) s = Add (p, q) a = Relu (s) y = Conv (a, w3) }"""
RESIDUAL_WEIGHTS = {"w1": (5, 3, 1, 1), "b1": (5,), "w2": (5, 3, 3, 3), "b2": (5,), "w3": (4, 5, 1, 1)}
CONCAT = """(float[2, 3, 8, 8] x) => (float[2, 4, 4, 4] y)
    { p = Conv (x, w1, b1) q = Conv (x, w2, b2) a = Relu (p) b = Relu (q) c = Concat <axis = 1> (a, b)
      m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c) y = Conv (m, w3, b3) }"""
CONCAT_WEIGHTS = {"w1": (4, 3, 1, 1), "b1": (4,), "w2": (3, 3, 1, 1), "b2": (3,), "w3": (4, 7, 1, 1), "b3": (4,)}
POOLED = """(float[2, 3, 6, 6] x) => (float[2, 4] y)
    { z = Conv (x, w1, b1) a = Relu (z) g = GlobalAveragePool (a) f = Flatten (g)
      y = Gemm <transB = 1> (f, w2, b2) }"""
POOLED_WEIGHTS = {"w1": (6, 3, 3, 3), "b1": (6,), "w2": (4, 6), "b2": (4,)}
FLAT = """(float[2, 3, 4, 4] x) => (float[2, 4] y)
    { z = Conv (x, w1, b1) a = Relu (z) f = Flatten (a) y = Gemm (f, w2, b2) }"""
FLAT_WEIGHTS = {"w1": (6, 3, 2, 2), "b1": (6,), "w2": (54, 4), "b2": (4,)}
RESHAPED = FLAT.replace("Flatten (a)", "Reshape (a, shape)")
GEMMS = """(float[4, 5] x) => (float[4, 3] y)
    { z = Gemm (x, w1, b1) a = Relu (z) u = Gemm <transB = 1> (a, w2, b2) v = Relu (u) y = Gemm (v, w3) }"""
GEMMS_WEIGHTS = {"w1": (5, 6), "b1": (6,), "w2": (7, 6), "b2": (7,), "w3": (7, 3)}
MATMULS = """(float[2, 4, 5] x) => (float[2, 4, 3] y)
    { z = MatMul (x, w1) t = Add (z, b1) a = Relu (t) u = MatMul (a, w2) y = Add (u, b2) }"""
MATMULS_WEIGHTS = {"w1": (5, 6), "b1": (6,), "w2": (6, 3), "b2": (3,)}
UP = """(float[2, 3, 4, 4] x) => (float[2, 4, 8, 8] y)
    { z = ConvTranspose <strides = [2, 2]> (x, w1, b1) a = Relu (z) y = Conv (a, w2, b2) }"""
UP_WEIGHTS = {"w1": (3, 6, 2, 2), "b1": (6,), "w2": (4, 6, 1, 1), "b2": (4,)}
DOWN_UP = """(float[2, 3, 4, 4] x) => (float[2, 4, 8, 8] y)
    { z = Conv (x, w1, b1) a = Relu (z) y = ConvTranspose <strides = [2, 2]> (a, w2, b2) }"""
DOWN_UP_WEIGHTS = {"w1": (6, 3, 1, 1), "b1": (6,), "w2": (6, 4, 2, 2), "b2": (4,)}

# Graph, weights, rows of 0 bits with their biases, channels that go, shapes that stay.
CASES = {
    "1x1": (CHAIN, ONE, {"w1": {1: 0.7, 4: -0.3}}, {"z": (1, 4)}, {"z": (4, 3, 1, 1), "y": (4, 4, 1, 1)}),
    "3x3, padded": (PADDED, THREE, {"w1": {1: 0.7, 4: -0.3}}, {"z": (4,)}, {"z": (5, 3, 1, 1), "y": (4, 5, 3, 3)}),
    "3x3, not padded": (VALID, THREE, {"w1": {1: 0.7, 4: -0.3}}, {"z": (1, 4)}, {"y": (4, 4, 3, 3)}),
    "no bias yet": (UNBIASED, ONE, {"w1": {1: 0.7}}, {"z": (1,)}, {"y": (4, 5, 1, 1)}),
    # 3 has no weights after an input that has some; 4 and 5 are constant at the border too only where they are 0.
    "depthwise": (
        MOBILE,
        MOBILE_WEIGHTS,
        {"w1": {4: -0.1, 5: 0.6}, "w2": {3: 0.5, 1: -0.2}},
        {"z": (1, 3, 4), "d": (1, 3, 4)},
        {"z": (3, 3, 1, 1), "d": (3, 1, 3, 3), "y": (4, 3, 3, 3)},
    ),
    "residual": (
        RESIDUAL,
        RESIDUAL_WEIGHTS,
        {"w1": {1: 0.7, 3: 0.2}, "w2": {3: 0.4, 4: -0.5}},
        {"p": (3,), "q": (3,)},
        {"p": (4, 3, 1, 1), "q": (4, 3, 3, 3), "y": (4, 4, 1, 1)},
    ),
    "concat": (
        CONCAT,
        CONCAT_WEIGHTS,
        {"w1": {1: 0.7}, "w2": {0: -0.4, 2: 0.3}},
        {"p": (1,), "q": (0, 2)},
        {"p": (3, 3, 1, 1), "q": (1, 3, 1, 1), "y": (4, 4, 1, 1)},
    ),
    "pooled": (POOLED, POOLED_WEIGHTS, {"w1": {0: 0.7, 5: -0.4}}, {"z": (0, 5)}, {"z": (4, 3, 3, 3), "y": (4, 4)}),
    "flattened": (FLAT, FLAT_WEIGHTS, {"w1": {2: 0.7, 5: -0.4}}, {"z": (2, 5)}, {"y": (36, 4)}),
    "reshaped": (RESHAPED, FLAT_WEIGHTS | {"shape": np.array([2, 54])}, {"w1": {2: 0.7}}, {"z": (2,)}, {"y": (45, 4)}),
    "gemms": (
        GEMMS,
        GEMMS_WEIGHTS,
        {"w1": {2: 0.7}, "w2": {0: 0.4, 3: -0.2}},
        {"z": (2,), "u": (0, 3)},
        {"z": (5, 5), "u": (5, 5), "y": (5, 3)},
    ),
    "matmuls": (MATMULS, MATMULS_WEIGHTS, {"w1": {2: 0.7, 3: -0.2}}, {"z": (2, 3)}, {"z": (5, 4), "u": (4, 3)}),
    "from ConvTranspose": (UP, UP_WEIGHTS, {"w1": {2: 0.7, 3: -0.2}}, {"z": (2, 3)}, {"z": (3, 4, 2, 2)}),
    "to ConvTranspose": (DOWN_UP, DOWN_UP_WEIGHTS, {"w1": {2: 0.7, 3: -0.2}}, {"z": (3,)}, {"y": (5, 4, 2, 2)}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_channels_go(ort_run, name, form):
    graph, weights, zeros, gone, left = CASES[name]
    model, feeds = emitted(graph, weights, zeros, ort_run, form)
    small, removal = pruned(model, feeds, ort_run)
    assert by_output(removal.outputs, model) == gone
    assert left.items() <= shapes(small).items()


# A layer between: its output is the last tensor of integers, which are the same bit for bit.
BETWEEN = """(float[2, 3, 8, 8] x) => (float[2, 4, 8, 8] y)
    { z = Conv (x, w1, b1) a = Relu (z) u = Conv (a, w2, b2) v = Relu (u) y = Conv (v, w3) }"""
BETWEEN_WEIGHTS = ONE | {"w2": (40, 6, 1, 1), "b2": (40,), "w3": (4, 40, 1, 1)}
INTEGERS = {
    "1x1": (BETWEEN, BETWEEN_WEIGHTS, {"w1": {1: 0.7, 4: -0.3}}),
    "no bias yet": (BETWEEN.replace(", b2", ""), BETWEEN_WEIGHTS, {"w1": {1: 0.7, 4: -0.3}}),
    "depthwise": (
        MOBILE.replace("y = Conv (e", "f = Conv (e").replace("}", "g = Relu (f) y = Conv (g, w4) }"),
        MOBILE_WEIGHTS | {"w4": (4, 4, 1, 1)},
        {"w1": {4: -0.1}, "w2": {3: 0.5}},
    ),
    "gemms": (GEMMS, GEMMS_WEIGHTS, {"w1": {2: 0.7, 4: 0.4}}),
}


@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("name", INTEGERS)
def test_integers_stay_the_same_bit_for_bit(ort_run, name, bits):
    model, feeds = emitted(*INTEGERS[name], ort_run, "integers", bits=bits)
    rank = len(model.graph.output[0].type.tensor_type.shape.dim)
    last = next(n for n in reversed(model.graph.node) if n.op_type in ("QuantizeLinear", "Clip"))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(last.output[0], TensorProto.UINT8, [None] * rank))
    small, removal = pruned(model, feeds, ort_run, exact=LEVELS)
    assert removal.outputs
    assert len(np.unique(ort_run(small, feeds)[0])) > 4
    # The changed biases are still INT32.
    kinds = {t.data_type for t in small.graph.initializer if t.name.startswith("b")}
    assert TensorProto.INT32 in kinds


KEPT = {
    "pads": (PADDED, THREE, {"w1": {1: 0.7}}, {"z": {1: "does not add it equally at all positions"}}),
    "auto_pad": (
        CHAIN.replace("y = Conv", 'y = Conv <auto_pad = "SAME_UPPER">'),
        THREE,
        {"w1": {1: 0.7}},
        {"z": {1: "does not add it equally at all positions"}},
    ),
    "ConvTranspose": (
        DOWN_UP,
        DOWN_UP_WEIGHTS,
        {"w1": {2: 0.7}},
        {"z": {2: "does not add it equally at all positions"}},
    ),
    "graph output": (CHAIN, ONE, {"w1": {2: -0.1}, "w2": {0: 0.5}}, {"y": {0: "it is an output of the network"}}),
    "one side of an Add": (
        RESIDUAL,
        RESIDUAL_WEIGHTS,
        {"w1": {1: 0.7}, "w2": {4: 0.1}},
        {"p": {1: "it varies where"}, "q": {4: "it varies where"}},
    ),
    "all": (CHAIN, ONE, {"w1": dict.fromkeys(range(6), -0.5)}, {"z": {0: "the last channel"}}),
    "unknown operator": (
        CHAIN.replace("Relu (z)", "InstanceNormalization (z, s, s)"),
        ONE | {"s": np.ones(6, "f")},
        {"w1": {2: 0.7}},
        {"z": {2: "InstanceNormalization InstanceNormalization_0 reads it"}},
    ),
    "other axis": (CHAIN.replace("Relu (z)", "Softmax <axis = 1> (z)"), ONE, {"w1": {2: 0.7}}, {"z": {2: "Softmax"}}),
    "groups": (
        CHAIN.replace("y = Conv", "y = Conv <group = 2>"),
        ONE | {"w2": (4, 3, 1, 1)},
        {"w1": {2: -0.7}},
        {"z": {2: "has 2 groups"}},
    ),
    "MatMul without Add": (
        MATMULS.replace("y = Add (u, b2)", "y = Tanh (u)"),
        MATMULS_WEIGHTS,
        {"w1": {2: 0.7}},
        {"z": {2: "no Add of a constant after"}},
    ),
    "alpha": (
        GEMMS.replace("u = Gemm <", "u = Gemm <alpha = 2.0, "),
        GEMMS_WEIGHTS,
        {"w1": {2: -0.7}},
        {"z": {2: "Gemm"}},
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", KEPT)
def test_kept_channels_have_reasons(ort_run, name, form):
    graph, weights, zeros, reasons = KEPT[name]
    model, feeds = emitted(graph, weights, zeros, ort_run, form)
    _, removal = pruned(model, feeds, ort_run)
    kept = {layer: dict(pairs) for layer, pairs in by_output(removal.kept, model).items()}
    assert kept.keys() == reasons.keys()
    for layer, parts in reasons.items():
        assert kept[layer].keys() == parts.keys()
        assert all(text in kept[layer][channel] for channel, text in parts.items())
    gone = by_output(removal.outputs, model)
    # Each channel of 0 bits is in one of the two lists.
    assert sum(map(len, (*kept.values(), *gone.values()))) == sum(map(len, zeros.values()))


def test_layers_that_share_a_weight_lose_the_same(ort_run):
    graph = """(float[2, 3, 6, 6] x) => (float[2, 4, 6, 6] y, float[2, 4, 6, 6] t)
        { z = Conv (x, w1, b1) a = Relu (z) n = Neg (x) u = Conv (n, w1, b3) v = Relu (u)
          y = Conv (a, w2, b2) t = Conv (v, w2) }"""
    weights = ONE | {"b3": np.array([0.1, 0.4, -0.2, 0.3, -0.5, 0.6], np.float32)}
    for form in FORMS:
        model, feeds = emitted(graph, weights, {"w1": {1: 0.7, 4: -0.3}}, ort_run, form)
        small, removal = pruned(model, feeds, ort_run)
        assert by_output(removal.outputs, model) == {"z": (1, 4), "u": (1, 4)}
        stored = [t.dims for t in small.graph.initializer if t.data_type == TensorProto.INT8 and len(t.dims) == 4]
        assert sorted(map(tuple, stored)) == [(4, 3, 1, 1), (4, 4, 1, 1)]
        # One user of w2 pads, so its channels stay in both.
        padded = graph.replace("t = Conv", "t = Conv <pads = [1, 1, 1, 1]>").replace("4, 6, 6] t", "4, 8, 8] t")
        model, feeds = emitted(padded, weights, {"w1": {1: 0.7, 4: -0.3}}, ort_run, form)
        _, removal = pruned(model, feeds, ort_run)
        assert by_output(removal.outputs, model) == {"z": (4,), "u": (4,)}


@pytest.mark.parametrize(
    ("graph", "channels", "empty", "removed"),
    [
        (CHAIN, 32, 10, 8),
        (CHAIN, 20, 10, 10),  # no multiple of 8 to begin with
        (MOBILE, 32, 10, 0),  # a depthwise layer: 32 or 16, not 24
        (MOBILE, 32, 17, 16),
        (MOBILE, 24, 10, 8),
    ],
)
def test_channel_counts_that_kernels_are_fast_on(ort_run, graph, channels, empty, removed):
    """The channels of 0 bits that stay say why."""
    weights = (ONE if graph is CHAIN else MOBILE_WEIGHTS) | {"w1": (channels, 3, 1, 1), "b1": (channels,)}
    if graph is CHAIN:
        weights["w2"] = (4, channels, 1, 1)
    else:
        weights |= {"w2": (channels, 1, 3, 3), "b2": (channels,), "w3": (4, channels, 3, 3)}
    zeros = {name: dict.fromkeys(range(empty), 0.0) for name in ("w1", "w2") if graph is MOBILE or name == "w1"}
    graph = graph.replace("group = 6", f"group = {channels}")
    model, _ = emitted(graph, weights, zeros, ort_run, "integers")
    removal = removable(model, 8, 16)
    assert len(by_output(removal.outputs, model).get("z", ())) == removed
    kept = by_output(removal.kept, model).get("z", ())
    assert len(kept) == empty - removed
    step = 16 if "d = Conv" in graph and channels % 16 == 0 else 8
    assert all(f"would not be a multiple of {step}" in reason for _, reason in kept)


def floats(graph, weights):
    """A model with float weights as given, and feeds."""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17, "some.domain": 1]> g {graph}')
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    model = run_passes(NORMALIZE, model)
    rng = np.random.default_rng(1)
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    return model, {"x": rng.standard_normal(shape, np.float32)}


def test_weight_shared_in_two_orientations_stays(ort_run):
    graph = """(float[4, 6] x) => (float[4, 6] y)
        { z = Gemm (x, w1) a = Relu (z) u = Gemm <transB = 1> (a, w1) v = Relu (u) y = Gemm (v, w3) }"""
    rng = np.random.default_rng(0)
    weights = {"w1": rng.standard_normal((6, 6), np.float32), "w3": rng.standard_normal((6, 6), np.float32)}
    weights["w1"][:, 2] = 0
    model, feeds = floats(graph, weights)
    _, removal = pruned(model, feeds, ort_run)
    assert not removal.outputs
    assert "share a weight" in by_output(removal.kept, model)["z"][0][1]


# Behind z, which has the constant channels 1 (0.7) and 4 (-0.3).
FUNCTIONS = {
    "LeakyRelu": "a = LeakyRelu <alpha = 0.1> (z)",
    "PRelu": "a = PRelu (z, slope)",
    "Clip": "a = Clip (z, low, high)",
    "HardSwish": "a = HardSwish (z)",
    "Swish": "s = Sigmoid (z) a = Mul (z, s)",
    "Gelu": "r = Div (z, root) e = Erf (r) f = Add (e, one) g = Mul (z, f) a = Mul (g, half)",
    "Elu": "a = Elu (z)",
    "Tanh": "a = Tanh (z)",
    "scale and shift": "s = Mul (z, slope) a = Add (s, shift)",
    "shift from position to position": "a = Add (z, position)",
    "excitation": "g = GlobalAveragePool (z) s = Sigmoid (g) a = Mul (z, s)",
    "gate": "g = Conv (x, wg) s = Sigmoid (g) r = Relu (z) a = Mul (r, s)",
    "AveragePool": "a = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (z)",
    "MaxPool": "a = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (z)",
    "ReduceMean": "r = ReduceMean <axes = [2, 3]> (z) a = Sub (z, r)",
    "Resize": 'r = Resize <mode = "nearest"> (z, , twice) a = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)',
    "Max": "a = Max (z, shift)",
}
CONSTANTS = {
    "slope": np.linspace(-1, 1, 6, dtype="f").reshape(6, 1, 1),
    "shift": np.linspace(-1, 2, 6, dtype="f").reshape(1, 6, 1, 1),
    "position": np.random.default_rng(2).standard_normal((1, 6, 6, 6), np.float32),
    "root": np.float32(2**0.5),
    "one": np.float32(1),
    "half": np.float32(0.5),
    "low": np.float32(-0.1),
    "high": np.float32(0.5),
    "twice": np.array([1, 1, 2, 2], np.float32),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_constants_pass_through(ort_run, name, form):
    graph = CHAIN.replace("a = Relu (z)", FUNCTIONS[name])
    used = {n: v for n, v in CONSTANTS.items() if n in FUNCTIONS[name]}
    used |= {"wg": (6, 3, 1, 1)} if name == "gate" else {}
    model, feeds = emitted(graph, ONE | used, {"w1": {1: 0.7, 4: -0.3}}, ort_run, form)
    small, removal = pruned(model, feeds, ort_run)
    # A channel of zeros stays zero whatever its gate, which goes as well.
    expected = {"gate": {"z": (4,), "g": (4,)}, "shift from position to position": {}}.get(name, {"z": (1, 4)})
    assert by_output(removal.outputs, model) == expected
    assert shapes(small)["y"] == (4, 6 - len(expected.get("z", ())), 1, 1)


def test_explicit_padding_with_the_channel_s_own_value(ort_run):
    graph = PADDED.replace("y = Conv <pads = [1, 1, 1, 1]> (a,", "p = Pad (a, pads) y = Conv (p,")
    weights = THREE | {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}
    for form in FORMS:
        model, feeds = emitted(graph, weights, {"w1": {1: 0.7, 4: -0.3}}, ort_run, form)
        small, removal = pruned(model, feeds, ort_run)
        assert by_output(removal.outputs, model) == {"z": (4,)}
        assert shapes(small)["y"] == (4, 5, 3, 3)


@pytest.mark.parametrize("bits", [8, 4])
def test_ceilings_for_each_channel(ort_run, bits):
    graph = CHAIN.replace("a = Relu (z)", "r = Relu (z) a = Min (r, caps)")
    caps = np.array([0.7, 0.3, 1.2, 60, 1, 2], np.float32).reshape(1, 6, 1, 1)
    model, feeds = emitted(graph, ONE | {"caps": caps}, {"w1": {1: 0.7, 4: -0.3}}, ort_run, "integers", bits=bits)
    small, removal = pruned(model, feeds, ort_run)
    assert by_output(removal.outputs, model) == {"z": (1, 4)}
    (node,) = (n for n in small.graph.node if n.op_type == "Min")
    (top,) = (numpy_helper.to_array(t) for t in small.graph.initializer if t.name == node.input[1])
    assert top.dtype == np.uint8
    assert top.size == 4


def test_inputs_that_no_output_needs_go_too(ort_run):
    """u's rows 0 and 1 have no weights; once they are gone, nothing reads channel 3 of z, which varies."""
    model, feeds = emitted(GEMMS, GEMMS_WEIGHTS, {"w2": {0: 0.4, 1: -0.2}}, ort_run, "integers")
    weight = next(t for t in model.graph.initializer if t.name == "w2_quantized")
    value = numpy_helper.to_array(weight).copy()
    value[2:, 3] = 0
    weight.CopyFrom(numpy_helper.from_array(value, weight.name))
    _, removal = pruned(model, feeds, ort_run)
    assert by_output(removal.outputs, model) == {"z": (3,), "u": (0, 1)}
    assert by_output(removal.inputs, model) == {"u": (3,), "y": (0, 1)}


def test_row_with_only_removed_inputs_becomes_constant(ort_run):
    model, feeds = emitted(GEMMS, GEMMS_WEIGHTS, {"w1": {2: 0.7}}, ort_run, "integers")
    weight = next(t for t in model.graph.initializer if t.name == "w2_quantized")
    value = numpy_helper.to_array(weight).copy()
    value[5] = [0, 0, 9, 0, 0, 0]
    weight.CopyFrom(numpy_helper.from_array(value, weight.name))
    _, removal = pruned(model, feeds, ort_run)
    assert by_output(removal.outputs, model) == {"z": (2,), "u": (5,)}


def test_bias_that_would_overflow(ort_run):
    model, _ = emitted(BETWEEN, BETWEEN_WEIGHTS, {"w1": {1: 0.7}}, ort_run, "integers")
    weights = {t.name: t for t in model.graph.initializer}
    column = numpy_helper.to_array(weights["w2_quantized"])[:, 1, 0, 0]
    bias = numpy_helper.to_array(weights["b2_quantized"]).copy()
    for room, goes in ((0, False), (10**6, True)):
        bias[0] = int(np.sign(column[0])) * (2**31 - 1 - room)
        weights["b2_quantized"].CopyFrom(numpy_helper.from_array(bias, "b2_quantized"))
        removal = removable(model)
        assert bool(removal.outputs) == goes
        assert goes or "would not fit into INT32" in removal.kept["Conv_0"][0][1]


def test_what_a_subgraph_or_a_custom_operator_reads_stays(ort_run):
    graph = """(float[2, 3, 6, 6] x, bool c) => (float[2, 4, 6, 6] y, float[2, 6, 6, 6] t)
        { z = Conv (x, w1, b1) a = Relu (z) y = Conv (a, w2, b2)
          t = If (c) <then_branch = g1 () => (float[2, 6, 6, 6] p) { p = Neg (a) },
                      else_branch = g2 () => (float[2, 6, 6, 6] q) { q = Abs (a) }> }"""
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal(s, np.float32) for n, s in ONE.items()}
    weights["w1"][2] = 0
    model, feeds = floats(graph, weights)
    _, removal = pruned(model, feeds | {"c": np.array(True)}, ort_run)
    assert not removal.outputs
    assert "a body of If" in by_output(removal.kept, model)["z"][0][1]

    model, _ = floats(CHAIN.replace("Relu (z)", "some.domain.Relu (z)"), weights)
    assert not removable(model).outputs
    assert "Relu Relu_0 reads it" in by_output(removable(model).kept, model)["z"][0][1]


def test_other_consumers_of_an_initializer_keep_it_whole(ort_run):
    """b1 is also the shift of another tensor, whose channels all stay; w1 is an output's factor."""
    graph = """(float[2, 3, 6, 6] x) => (float[2, 4, 6, 6] y, float[2, 6] t, float[6, 3, 1, 1] v)
        { z = Conv (x, w1, b1) a = Relu (z) y = Conv (a, w2, b2)
          m = ReduceMean <axes = [1, 2, 3], keepdims = 0> (x) n = Unsqueeze (m, axis) t = Add (n, b1) v = Exp (w1) }"""
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal(s, np.float32) for n, s in ONE.items()} | {"axis": np.array([1])}
    weights["w1"][2] = 0
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {graph}')
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
    small, removal = pruned(model, {"x": rng.standard_normal((2, 3, 6, 6), np.float32)}, ort_run)
    assert by_output(removal.outputs, model) == {"z": (2,)}
    stored = {t.name: tuple(t.dims) for t in small.graph.initializer}
    assert stored["b1"] == (6,)
    assert stored["w1"] == (6, 3, 1, 1)
    assert stored["w2"] == (4, 5, 1, 1)  # has one consumer, and so keeps its name
    assert shapes(small)["z"] == (5, 3, 1, 1)


def test_names_and_declared_shapes(ort_run):
    graph = CHAIN.replace("{", "<float[2, 6, 6, 6] z, float[2, 6, 6, 6] a> {", 1)
    model, feeds = emitted(graph, ONE, {"w1": {1: 0.7, 4: -0.3}}, ort_run, "integers")
    small, _ = pruned(model, feeds, ort_run)
    assert [n.name for n in small.graph.node] == [n.name for n in model.graph.node]
    names = [{t.name for t in m.graph.initializer if not t.name.startswith("zero_points")} for m in (small, model)]
    assert names[0] == names[1]
    declared = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in small.graph.value_info}
    assert declared["z"] == [2, 4, 6, 6]


@pytest.mark.parametrize("form", FORMS)
def test_real_network(ort_run, form):
    """Residual blocks and an inverted one: channels coupled across a block are removed all or none."""
    model = run_passes(NORMALIZE, onnx.load(ROOT / "models" / "digits_cnn.onnx"))
    feeds = random_feeds(model)
    layers = [n for n in model.graph.node if n.op_type == "Conv"]
    model = quantized(model, feeds, {n.input[1]: (1, 5, 6, 9) for n in layers}, ort_run, form)
    small, removal = pruned(model, feeds, ort_run)
    assert len(removal.outputs) >= len(layers) // 2
    assert {*removal.outputs, *removal.kept} == {n.name for n in layers}
    total = [sum(int(np.prod(s)) for s in shapes(m).values()) for m in (small, model)]
    assert total[0] < total[1]
    # An inverted block is coupled through its depthwise convolution.
    assert removal.outputs["/8/body/body.0/Conv"] == removal.outputs["/8/body/body.3/Conv"] == (1, 5, 6, 9)


@st.composite
def chains(draw):
    """One to four convolutions with any supported operators between, and channels of 0 bits anywhere."""
    size, channels, nodes, weights, zeros, data = 6, 3, [], {}, {}, "x"
    for index in range(draw(st.integers(2, 4))):
        kind = draw(st.sampled_from(["full", "depthwise", "residual"])) if index else "full"
        kernel = draw(st.sampled_from([1, 3])) if size > 3 else 1
        padding = draw(st.sampled_from([0, kernel // 2])) if kind == "full" else kernel // 2
        made = draw(st.integers(1, 6)) if kind == "full" else channels
        group, width = (channels, 1) if kind == "depthwise" else (1, channels)
        weights |= {f"w{index}": (made, width, kernel, kernel), f"b{index}": (made,)}
        if made > 1 or kind == "full":
            chosen = draw(st.sets(st.integers(0, made - 1)))
            zeros[f"w{index}"] = {c: draw(st.sampled_from([-0.6, 0.0, 0.4])) for c in chosen}
        nodes.append(
            f"z{index} = Conv <group = {group}, pads = [{padding}, {padding}, {padding}, {padding}]> "
            f"({data}, w{index}, b{index})"
        )
        output = f"z{index}"
        if kind == "residual":
            nodes.append(f"r{index} = Add ({data}, {output})")
            output = f"r{index}"
        function = draw(st.sampled_from(["Relu", "Sigmoid", "LeakyRelu"]))
        nodes.append(f"a{index} = {function} ({output})")
        data, channels, size = f"a{index}", made, size + 2 * padding - kernel + 1
    nodes.append(f"y = Conv ({data}, w9)")
    weights["w9"] = (2, channels, 1, 1)
    graph = f"(float[2, 3, 6, 6] x) => (float[2, 2, {size}, {size}] y) {{ {' '.join(nodes)} }}"
    return graph, weights, zeros


@given(chain=chains(), form=st.sampled_from(FORMS))
@settings(max_examples=60, deadline=None)
def test_random_chains(ort_run, chain, form):
    model, feeds = emitted(*chain, ort_run, form)
    pruned(model, feeds, ort_run, unfused=0.02 if form == "integers" else 1e-5)

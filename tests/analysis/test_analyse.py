"""Layers with their channel axes, activations where their values are computed, and reasons for float."""

import re

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.analysis.analyse import analyse, integer_ranges
from rdoq_onnx.analysis.normalization import NORMALIZE
from rdoq_onnx.analysis.skips import presumed_finite
from rdoq_onnx.config import Config
from rdoq_onnx.errors import ConfigError, ModelError
from rdoq_onnx.model import external
from rdoq_onnx.model.layers import LAYER_TYPES, Activation
from rdoq_onnx.model.protos import all_nodes
from rdoq_onnx.passes import run_passes
from rdoq_onnx.system.io import read_model
from tests.conftest import ROOT, real_models


def parse(text, **shapes):
    """A normalized model from the text of its graph, with weights given by value or by shape (random)."""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        value = rng.standard_normal(shape, np.float32) if isinstance(shape, tuple) else shape
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    return run_passes(NORMALIZE, model)


def find(text, config=None, **shapes):
    return analyse(parse(text, **shapes), (config or Config()).selection)


def tensors(network):
    """Where quantizers are placed: those within the budget, and those for fusion."""
    feeding = [a.tensor for a in network.activations if not a.fusion]
    return feeding, [a.tensor for a in network.activations if a.fusion]


LAYERS = {
    "Conv": ("z = Conv (x, w)", (6, 4, 3, 3), 0, 6),
    "Conv in groups": ("z = Conv <group = 4> (x, w)", (8, 1, 3, 3), 0, 8),
    "ConvTranspose": ("z = ConvTranspose (x, w)", (4, 5, 2, 2), 1, 5),
    "ConvTranspose in groups": ("z = ConvTranspose <group = 2> (x, w)", (4, 3, 2, 2), 1, 3),
    "MatMul": ("z = MatMul (x, w)", (8, 5), 1, 5),
    "MatMul, constant on the left": ("z = MatMul (w, x)", (7, 8), 0, 7),
    "Gemm": ("f = Flatten (x) z = Gemm (f, w)", (256, 3), 1, 3),
    "Gemm, transB": ("f = Flatten (x) z = Gemm <transB = 1> (f, w)", (3, 256), 0, 3),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layer_and_its_channels(kind):
    nodes, shape, axis, channels = LAYERS[kind]
    network = find(f"g (float[1, 4, 8, 8] x) => (float z) {{ {nodes} }}", w=shape)
    (layer,) = network.layers
    assert (layer.weight, layer.linear.op_type) == ("w", kind.split()[0].rstrip(","))
    assert (layer.linear.axis, layer.linear.channels) == (axis, channels)
    assert layer.linear.weight_side == (0 if "left" in kind else 1)
    (use,) = layer.uses
    assert (use.data, use.output, layer.name) == ("f" if "Gemm" in kind else "x", "z", use.node)
    assert network.skipped == ()


def test_layer_keeps_the_attributes_that_matter():
    network = find(
        """g (float[1, 4, 8, 8] x) => (float z, float u)
        { z = Conv <strides = [2, 1], pads = [1, 0, 1, 0], dilations = [1, 2]> (x, w)
          f = Flatten <axis = 3> (x) u = Gemm <transA = 1, alpha = 0.5> (f, v) }""",
        w=(6, 4, 3, 3),
        v=(32, 5),
    )
    conv, gemm = (layer.uses[0].linear for layer in network.layers)
    assert (conv.strides, conv.pads, conv.dilations, conv.group) == ((2, 1), (1, 0, 1, 0), (1, 2), 1)
    assert (gemm.trans_a, gemm.trans_b, gemm.alpha) == (True, False, 0.5)


INDIRECT = {
    "Constant": "w = Constant <value = float[2, 3] {1, 2, 3, 4, 5, 6}> ()",
    "Transpose": "w = Transpose <perm = [1, 0]> (v)",
    "Transpose of a Constant": "c = Constant <value = float[3, 2] {1, 2, 3, 4, 5, 6}> () w = Transpose (c)",
    "Reshape": "s = Constant <value_ints = [2, 3]> () w = Reshape (v, s)",
    "Reshape and Transpose": "s = Constant <value_ints = [3, 2]> () r = Reshape (v, s) w = Transpose (r)",
    "Cast from half precision": "w = Cast <to = 1> (h)",
}


@pytest.mark.parametrize("kind", INDIRECT)
def test_weight_through_constant_operators(ort_run, kind):
    half = np.array([[1, -2, 3], [4, 5, 0.5]], np.float16)
    text = f"g (float[4, 2] x) => (float[4, 3] z) {{ {INDIRECT[kind]} z = MatMul (x, w) }}"
    network = find(text, v=(3, 2), h=half)
    (layer,) = network.layers
    assert layer.linear.shape == (2, 3)
    weight = next(t for t in network.model.graph.initializer if t.name == layer.weight)
    x = np.random.default_rng(1).standard_normal((4, 2), np.float32)
    (z,) = ort_run(network.model, {"x": x})
    np.testing.assert_allclose(z, x @ numpy_helper.to_array(weight), rtol=1e-5, atol=1e-6)
    assert len(network.model.graph.node) == 1


def test_network_input_and_outputs_of_activation_functions():
    network = find(
        """g (float[1, 4, 8, 8] x) => (float y)
        { z1 = Conv (x, w1) a1 = Relu (z1) z2 = Conv (a1, w2) a2 = Clip (z2, low, high)
          z3 = Conv (a2, w3) s = Sigmoid (z3) a3 = Mul (z3, s) y = Conv (a3, w4) }""",
        low=np.float32(0),
        high=np.float32(6),
        **{f"w{k}": (4, 4, 1, 1) for k in (1, 2, 3, 4)},
    )
    # z3 has two consumers, so no Relu or Clip can absorb it; its convolution still needs a quantized output.
    assert tensors(network) == (["x", "a1", "a2", "a3"], ["z3"])


MOVERS = {
    "MaxPool": "m = MaxPool <kernel_shape = [2, 2]> (a)",
    "Transpose": "m = Transpose <perm = [0, 1, 3, 2]> (a)",
    "Pad": "p = Constant <value_ints = [0, 0, 1, 1, 0, 0, 1, 1]> () m = Pad (a, p)",
    "Reshape": "s = Constant <value_ints = [1, 4, 16, 4]> () m = Reshape (a, s)",
    "several": "b = MaxPool <kernel_shape = [2, 2]> (a) m = Transpose <perm = [0, 1, 3, 2]> (b)",
    "Resize to the nearest": """e = Constant <value_floats = [1.0, 1.0, 2.0, 2.0]> ()
                                m = Resize <mode = "nearest"> (a, , e)""",
}
MOVE_NOT = {
    "AveragePool": "m = AveragePool <kernel_shape = [2, 2]> (a)",
    "MaxPool with indices": "m, i = MaxPool <kernel_shape = [2, 2]> (a)",
    "Pad with ones": """p = Constant <value_ints = [0, 0, 1, 1, 0, 0, 1, 1]> ()
                        o = Constant <value_float = 1.0> () m = Pad (a, p, o)""",
    "Resize, interpolated": """e = Constant <value_floats = [1.0, 1.0, 2.0, 2.0]> ()
                               m = Resize <mode = "linear"> (a, , e)""",
}


@pytest.mark.parametrize("kind", [*MOVERS, *MOVE_NOT])
def test_activation_is_quantized_before_movement_operators(kind):
    network = find(
        f"""g (float[1, 4, 8, 8] x) => (float y)
        {{ z = Conv (x, w1) a = Relu (z) {(MOVERS | MOVE_NOT)[kind]} y = Conv (m, w2) }}""",
        w1=(4, 4, 1, 1),
        w2=(4, 4, 1, 1),
    )
    if kind in MOVERS:
        assert tensors(network) == (["x", "a"], [])
        assert network.activations[1] == Activation("a", feeds=("m",), moved=("m",))
    else:
        assert tensors(network) == (["x", "m"], ["a"])


def test_flatten_before_a_classifier():
    network = find(
        """g (float[2, 4, 8, 8] x) => (float y)
        { z = Conv (x, w1) a = Relu (z) p = GlobalAveragePool (a) f = Flatten (p) y = Gemm (f, w2) }""",
        w1=(4, 4, 1, 1),
        w2=(4, 3),
    )
    assert tensors(network) == (["x", "p"], ["a"])
    assert network.activations[2].feeds == ("f",)


def test_what_a_body_captures_is_not_constant():
    """An If whose condition is constant, and whose branches read the input."""
    network = find(
        """g (float[N, 4] x) => (float[N, 3] y) {
        a = If (p) <then_branch = b1 () => (float[N, 4] t) { t = Relu (x) },
                    else_branch = b2 () => (float[N, 4] s) { s = Abs (x) }>
        y = MatMul (a, w) }""",
        p=np.array(True),
        w=(4, 3),
    )
    assert [layer.weight for layer in network.layers] == ["w"]


def test_one_quantizer_however_many_consumers():
    network = find(
        """g (float[1, 4, 8, 8] x) => (float y1, float y2, float y3)
        { z = Conv (x, w1) a = Relu (z) m = MaxPool <kernel_shape = [2, 2]> (a)
          y1 = Conv (a, w2) y2 = Conv (a, w3) y3 = Conv (m, w4) }""",
        **{f"w{k}": (4, 4, 1, 1) for k in (1, 2, 3, 4)},
    )
    assert [a.tensor for a in network.activations] == ["x", "a"]
    assert network.activations[1].feeds == ("a", "m")


def test_concat_is_quantized_in_its_parts():
    network = find(
        """g (float[1, 4, 8, 8] x) => (float y)
        { z1 = Conv (x, w1) z2 = Conv (x, w2) a1 = Relu (z1) a2 = Relu (z2)
          c = Concat <axis = 1> (a1, a2) y = Conv (c, w3) }""",
        w1=(4, 4, 1, 1),
        w2=(4, 4, 1, 1),
        w3=(4, 8, 1, 1),
    )
    assert network.activations == (
        Activation("x", feeds=("x",)),
        Activation("c", feeds=("c",), parts=("a1", "a2")),
    )


def test_part_of_a_concat_with_other_consumers_keeps_its_own_quantizer():
    network = find(
        """g (float[1, 4, 8, 8] x) => (float y, float u)
        { z1 = Conv (x, w1) z2 = Conv (x, w2) a1 = Relu (z1) a2 = Relu (z2)
          c = Concat <axis = 1> (a1, a2) y = Conv (c, w3) u = Conv (a1, w4) }""",
        w1=(4, 4, 1, 1),
        w2=(4, 4, 1, 1),
        w3=(4, 8, 1, 1),
        w4=(4, 4, 1, 1),
    )
    assert tensors(network) == (["x", "a1", "c"], [])
    assert network.activations[2].parts == ("a2",)


def test_part_of_a_concat_with_a_consumer_other_than_a_layer():
    network = find(
        """g (float[1, 4, 8, 8] x) => (float y, float u)
        { z1 = Conv (x, w1) z2 = Conv (x, w2) a1 = Relu (z1) a2 = Relu (z2)
          c = Concat <axis = 1> (a1, a2) y = Conv (c, w3) u = Tanh (a1) }""",
        w1=(4, 4, 1, 1),
        w2=(4, 4, 1, 1),
        w3=(4, 8, 1, 1),
    )
    assert tensors(network) == (["x", "c"], ["a1"])
    assert network.activations[2].parts == ("a2",)


RESIDUAL = """g (float[1, 4, 8, 8] x) => (float y)
    { z1 = Conv (x, w1) a1 = Relu (z1) z2 = Conv (a1, w2) r = Add (z2, a1) a2 = Relu (r) y = Conv (a2, w3) }"""
RESIDUAL_WEIGHTS = {f"w{k}": (4, 4, 1, 1) for k in (1, 2, 3)}


def test_residual_branch_is_outside_the_budget():
    network = find(RESIDUAL, **RESIDUAL_WEIGHTS)
    assert tensors(network) == (["x", "a1", "a2"], ["z2"])
    assert network.activations[2] == Activation("z2")


def test_no_quantizer_between_a_convolution_and_a_sum_that_the_target_fuses():
    text = """g (float[1, 4, 8, 8] x) => (float z)
        { a = Conv (x, w) b = Conv (a, v) s = Add (a, b) z = Conv (s, u) }"""
    weights = dict.fromkeys("wvu", (4, 4, 1, 1))
    assert tensors(find(text, **weights)) == (["x", "a", "s"], ["b"])
    assert tensors(find(text, Config(target="openvino"), **weights)) == (["x", "a", "s"], [])


def test_activations_in_graph_order():
    network = find(RESIDUAL, **RESIDUAL_WEIGHTS)
    assert [a.tensor for a in network.activations] == ["x", "a1", "z2", "a2"]
    assert [layer.weight for layer in network.layers] == ["w1", "w2", "w3"]


def test_weights_only():
    network = find(RESIDUAL, Config(activation_bits=None), **RESIDUAL_WEIGHTS)
    assert network.activations == ()
    assert len(network.layers) == 3


def test_shared_weight_is_one_layer():
    network = find(
        """g (float[2, 4] x) => (float[2, 4] y)
        { z = MatMul (x, w) a = Tanh (z) y = MatMul (a, w) }""",
        w=(4, 4),
    )
    (layer,) = network.layers
    assert [(u.data, u.output) for u in layer.uses] == [("x", "z"), ("a", "y")]


def test_shared_kernel_at_two_strides_is_one_layer():
    """As in a filter bank, where each octave is the one above at half the rate."""
    network = find(
        """g (float[1, 2, 16] x) => (float[1, 3, 14] y, float[1, 3, 7] z)
        { y = Conv (x, w) z = Conv <strides = [2]> (x, w) }""",
        w=(3, 2, 3),
    )
    (layer,) = network.layers
    assert [u.linear.strides for u in layer.uses] == [(), (2,)]


def test_weight_used_in_two_ways_is_two_layers():
    network = find(
        """g (float[4, 4] x) => (float[4, 4] y)
        { z = Gemm (x, w) y = Gemm <transB = 1> (z, w) }""",
        w=(4, 4),
    )
    assert [(layer.weight, layer.linear.axis) for layer in network.layers] == [("w", 1), ("w", 0)]


SKIPS = {
    "both inputs are constant": ("u = MatMul (v, v)", {"v": (4, 4)}),
    "the constant is the data input": ("u = Gemm (v, x)", {"v": (4, 4)}),
    "computed from constants by a Exp": ("e = Exp (v) u = MatMul (x, e)", {"v": (4, 4)}),
    "so small (32 elements) that integers and scales": ("u = MatMul (x, v)", {"v": (2, 4, 4)}),
    "its weight has 1 dimensions, too few": ("u = MatMul (x, v)", {"v": (4,)}),
    "its weight is empty": ("u = MatMul (x, v)", {"v": (4, 0)}),
    "its weight holds NaN or infinity": ("u = MatMul (x, v)", {"v": np.full((4, 4), np.inf, np.float32)}),
    "INT32": ("h = Cast <to = 6> (x) u = MatMul (h, v)", {"v": np.ones((4, 4), np.int32)}),
}


@pytest.mark.parametrize("reason", SKIPS)
def test_reason_for_what_stays_in_float(reason):
    nodes, weights = SKIPS[reason]
    text = f"g (float[4, 4] x) => (float[4, 4] y, float u) {{ {nodes} y = MatMul (x, w) }}"
    if reason == "INT32":
        text = text.replace("float u", "int32 u")
    network = find(text, w=(4, 4), **weights)
    assert [layer.weight for layer in network.layers] == ["w"]
    (skip,) = network.skipped
    assert skip.op_type in ("MatMul", "Gemm")
    assert skip.node
    assert reason in skip.reason


def test_layer_whose_scales_a_target_does_not_support():
    """TensorRT takes one scale for the weight of a ConvTranspose."""
    text = "g (float[1, 4, 8, 8] x) => (float z) { y = ConvTranspose (x, w) z = Conv (y, v) }"
    network = find(text, Config(target="tensorrt"), w=(4, 5, 2, 2), v=(3, 5, 1, 1))
    assert [layer.weight for layer in network.layers] == ["v"]
    assert [(s.op_type, "one scale" in s.reason) for s in network.skipped] == [("ConvTranspose", True)]
    assert len(find(text, w=(4, 5, 2, 2), v=(3, 5, 1, 1)).layers) == 2


def test_nothing_to_quantize():
    with pytest.raises(ModelError, match="no Conv, ConvTranspose, Gemm, MatMul, GRU, LSTM, RNN has a constant weight"):
        find("g (float[4, 4] x) => (float[4, 4] y) { y = Relu (x) }")
    with pytest.raises(ModelError, match="MatMul 'MatMul_0': both inputs are computed"):
        find("g (float[4, 4] x) => (float[4, 4] y) { y = MatMul (x, x) }")


CHAIN = """g (float[2, 4] x) => (float[2, 4] y)
    { [first] z = MatMul (x, w1) [act] a = Relu (z) [second] y = MatMul (a, w2) }"""
CHAIN_WEIGHTS = {"w1": (4, 4), "w2": (4, 4)}


@pytest.mark.parametrize("pattern", ["first", "fir.*", "w1", ".*1"])
def test_exclude_by_node_or_weight_name(pattern):
    network = find(CHAIN, Config(exclude=(pattern,)), **CHAIN_WEIGHTS)
    assert [layer.name for layer in network.layers] == ["second"]
    assert [(s.node, s.reason) for s in network.skipped] == [("first", "excluded by --exclude")]
    assert [a.tensor for a in network.activations] == ["a"]


def test_exclude_a_name_that_does_not_match_itself_as_a_regex():
    model = parse(CHAIN, **CHAIN_WEIGHTS)
    model.graph.node[0].name = "/layer.0/(first)+"
    network = analyse(model, Config(exclude=("/layer.0/(first)+",)).selection)
    assert [layer.name for layer in network.layers] == ["second"]


def test_exclude_what_is_in_float_anyway():
    text = "g (float[4, 4] x) => (float[4, 4] y) { [attention] z = MatMul (x, x) y = MatMul (z, w) }"
    (skip,) = find(text, Config(exclude=("attention",)), w=(4, 4)).skipped
    assert "both inputs are computed" in skip.reason


def test_everything_excluded():
    with pytest.raises(ModelError, match="excluded by --exclude"):
        find(CHAIN, Config(exclude=(".*",)), **CHAIN_WEIGHTS)


@pytest.mark.parametrize("pattern", ["firs", "irst", "act", "a", "third.*"])
def test_exclude_that_matches_no_layer(pattern):
    with pytest.raises(ConfigError, match="--exclude '" + re.escape(pattern) + "' matches no layer"):
        find(CHAIN, Config(exclude=(pattern,)), **CHAIN_WEIGHTS)


@pytest.mark.parametrize("pattern", ["first", "w2", "a", "x", "sec.*"])
def test_pin_of_a_layer_or_activation(pattern):
    assert len(find(CHAIN, Config(pins=((pattern, 8),)), **CHAIN_WEIGHTS).layers) == 2


@pytest.mark.parametrize("pattern", ["firs", "z", "act"])
def test_pin_that_matches_nothing(pattern):
    with pytest.raises(ConfigError, match=f"--pin {pattern}=3 matches no layer or activation"):
        find(CHAIN, Config(pins=((pattern, 3),)), **CHAIN_WEIGHTS)


def test_pin_of_an_activation_needs_activations():
    with pytest.raises(ConfigError, match="--pin a=3"):
        find(CHAIN, Config(pins=(("a", 3),), activation_bits=None), **CHAIN_WEIGHTS)


def test_bundled_cnn():
    network = analyse(run_passes(NORMALIZE, read_model(ROOT / "models" / "digits_cnn.onnx")), Config().selection)
    types = [n.op_type for n in network.model.graph.node]
    assert len(network.layers) == types.count("Conv") + types.count("Gemm") == 11
    assert network.skipped == ()
    assert network.activations[0].tensor == "input"
    adds = [n for n in network.model.graph.node if n.op_type == "Add"]
    branches = {i for n in adds for i in n.input}
    fusion = {a.tensor for a in network.activations if a.fusion}
    assert branches & fusion


def test_bundled_transformer():
    network = analyse(run_passes(NORMALIZE, read_model(ROOT / "models" / "digits_vit.onnx")), Config().selection)
    assert network.skipped == ()
    # In each of the three blocks: the two products of attention, which have no weight.
    assert len(network.products) == 6
    # Patches, head, and in each block query-key-value, projection and two layers of the MLP.
    assert len(network.layers) == 2 + 3 * 4


def test_ranges_of_integer_inputs():
    model = parse(
        """g (int64[2, 5] ids, int64[2, 5] kinds, int64[2] free) => (float y, float z, int64[2] f)
        { flat = Flatten (ids) e = Gather (table, flat) k = Gather <axis = 1> (kinds_table, kinds)
          y = Identity (e) z = Identity (k) f = Add (free, free) }""",
        table=(11, 4),
        kinds_table=(4, 3),
    )
    assert integer_ranges(model) == {"ids": 11, "kinds": 3}


def test_an_invalid_axis_gives_no_range():
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (int64[N] i) => (float[N, 4] y) <float[7, 4] t> { e = Gather <axis = 5> (t, i) y = MatMul (e, w) }""")
    assert integer_ranges(model) == {}


@pytest.mark.parametrize("path", [p for p in real_models() if "silero" not in str(p.id)])
def test_weights_of_real_models_are_quantized(path):
    """All weights of Conv, Gemm and MatMul (95 % are required); silero_vad is left out, as its layers are in bodies."""
    model = run_passes(NORMALIZE, read_model(path))
    stored = {t.name: int(np.prod(t.dims)) for t in model.graph.initializer}
    read = {i for n in all_nodes(model.graph) if n.op_type in LAYER_TYPES for i in n.input[:2] if i in stored}
    quantized = {layer.weight for layer in analyse(model, Config().selection).layers}
    assert quantized <= read
    assert sum(stored[w] for w in quantized) == sum(stored[w] for w in read)


def test_detached_weights_may_be_presumed_finite(tmp_path):
    model = parse("agraph (float[N, 8] x) => (float[N, 4] y) { y = MatMul(x, w) }", w=np.full((8, 4), np.nan, "f"))
    with pytest.raises(ModelError, match="NaN or infinity"):
        analyse(model, Config().selection, presumed_finite)
    (tmp_path / "w").write_bytes(model.graph.initializer[0].raw_data)
    external.place(model.graph.initializer[0], external.Place(str(tmp_path / "w"), 0, 128))
    assert len(analyse(model, Config().selection, presumed_finite).layers) == 1
    with pytest.raises(ModelError, match="NaN or infinity"):
        analyse(model, Config().selection)


PRODUCT = """g (float[4, 4] x) => (float[4, 4] y, float[4, 4] u) {
    [p] t = Transpose (x) [q] u = MatMul (x, t) y = MatMul (x, w) }"""


def test_a_product_of_two_activations():
    network = find(PRODUCT, w=(4, 4))
    (product,) = network.products
    assert (product.node, product.operands, product.output) == ("q", ("x", "t"), "u")
    assert [a.feeds for a in network.activations] == [("x", "t")]
    assert network.skipped == ()


@pytest.mark.parametrize(
    "config",
    [Config(activation_bits=None), Config(target="openvino"), Config(target="tensorrt"), Config(exclude=("q",))],
)
def test_a_product_without_integer_kernel_is_listed(config):
    network = find(PRODUCT, config, w=(4, 4))
    assert network.products == ()
    assert [s.node for s in network.skipped] == ["q"]
    assert not any("t" in a.feeds for a in network.activations)


def test_a_part_of_a_split_has_a_quantizer_of_its_own():
    network = find(
        "g (float[2, 4, 8] x) => (float[2, 4, 4] y) { a = MatMul (x, w) q, k = Split <axis = 2> (a) "
        "t = Transpose <perm = [0, 2, 1]> (k) y = MatMul (q, t) }",
        w=(8, 8),
    )
    assert tensors(network) == (["x", "q", "k"], [])

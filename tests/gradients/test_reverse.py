"""g = J^T v against central differences, against onnx-ad's own rules, and on real models."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ad
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from rdoq_onnx.gradients.reverse import Reverse, reverse_model, straight_through
from rdoq_onnx.system.runtime import Runtime
from tests.conftest import ZOO

Array = NDArray[Any]
zoo = pytest.mark.skipif(not ZOO.is_dir(), reason="the zoo of real models is not beside the checkout")


RUNTIME = Runtime("cpu", 2)


def session(model: onnx.ModelProto, level: str = "ORT_ENABLE_BASIC", path: str = "") -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.optimized_model_filepath = path
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def reverse(
    model: onnx.ModelProto, at: Sequence[str], feeds: Mapping[str, Array], fetch: Sequence[str] = ()
) -> Reverse:
    outputs = [value.name for value in model.graph.output]
    result = reverse_model(model, at, outputs, fetch, feeds=feeds, runtime=RUNTIME)
    onnx.checker.check_model(result.model, full_check=True)
    return result


def seeds_for(result: Reverse, rng: np.random.Generator) -> dict[str, Array]:
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in result.model.graph.input}
    kinds = {i.name: i.type.tensor_type.elem_type for i in result.model.graph.input}
    return {
        seed: rng.choice([-1.0, 1.0], shapes[seed]).astype(helper.tensor_dtype_to_np_dtype(kinds[seed]))
        for seed in result.seeds.values()
    }


def gradients(result: Reverse, feeds: Mapping[str, Array], seeds: Mapping[str, Array]) -> dict[str, Array]:
    values = session(result.model, "ORT_ENABLE_ALL").run(list(result.adjoints.values()), {**feeds, **seeds})
    return dict(zip(result.adjoints, values, strict=True))


# --- the modified network: an Add behind each tensor ---


def with_adds(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]], dtype: int) -> onnx.ModelProto:
    """F~: every consumer of a tensor t, and the output of that name, reads t + add_t."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    nodes = []
    for name in shapes:
        if name in {value.name for value in graph.input}:
            nodes.append(helper.make_node("Add", [name, f"add {name}"], [f"sum {name}"]))
    for node in graph.node:
        nodes.append(node)
        read_sums(node, shapes)
        for i, name in enumerate(node.output):
            if name in shapes:
                node.output[i] = f"raw {name}"
                nodes.append(helper.make_node("Add", [f"raw {name}", f"add {name}"], [f"sum {name}"]))
    for value in graph.output:
        if value.name in shapes:
            nodes.append(helper.make_node("Identity", [f"sum {value.name}"], [value.name]))
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.input.extend(helper.make_tensor_value_info(f"add {n}", dtype, s) for n, s in shapes.items())
    return copy


def read_sums(node: onnx.NodeProto, names: Collection[str]) -> None:
    node.input[:] = [f"sum {name}" if name in names else name for name in node.input]
    for attribute in node.attribute:
        for inner in attribute.g.node:
            read_sums(inner, names)


def in_double(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for imported in copy.opset_import:  # below 15 the evaluator trains a BatchNormalization that has a momentum
        imported.version = max(imported.version, 17) if imported.domain == "" else imported.version
    for tensor in copy.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for value in (*copy.graph.input, *copy.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    for node in copy.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.DOUBLE
    return copy


def assert_adjoint(
    model: onnx.ModelProto,
    at: Sequence[str],
    feeds: Mapping[str, Array],
    step: float = 1e-6,
    same: onnx.ModelProto | None = None,
) -> None:
    """Check <g, d> = d/dh <v, F~(h d)> for random d, in float64 with the reference evaluator.

    same: a model of standard operators that computes what `model` does.
    """
    rng = np.random.default_rng(0)
    result = reverse(model, at, feeds)
    assert result.missing == {}
    assert list(result.adjoints) == list(at)
    seeds = seeds_for(result, rng)
    grads = gradients(result, feeds, seeds)
    shapes = {name: grad.shape for name, grad in grads.items()}
    network = ReferenceEvaluator(with_adds(in_double(same or model), shapes, TensorProto.DOUBLE))
    wide = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in feeds.items()}
    zero = {f"add {name}": np.zeros(shape) for name, shape in shapes.items()}

    def project(name: str, delta: Array) -> float:
        values = network.run(None, {**wide, **zero, f"add {name}": delta})
        named = zip([o.name for o in model.graph.output], values, strict=True)
        return sum(float(np.vdot(seeds[result.seeds[k]], v)) for k, v in named if k in result.seeds)

    for name, grad in grads.items():
        for _ in range(3):
            direction = rng.standard_normal(grad.shape)
            slope = (project(name, step * direction) - project(name, -step * direction)) / (2 * step)
            scale = float(np.linalg.norm(grad)) + 1e-3
            assert float(np.vdot(grad, direction)) == pytest.approx(slope, abs=2e-5 * scale), name


def text_model(text: str, weights: Mapping[str, Sequence[int]], opset: int = 17) -> onnx.ModelProto:
    """A graph in ONNX text with random weights of the given shapes."""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> {text}')
    rng = np.random.default_rng(1)
    for name, shape in weights.items():
        array = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def sample(shape: Sequence[int], seed: int = 2) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- every rule ---

# A unary piece between two Convs: x [2,3,8,9] -> c [2,4,8,9] -> piece -> y
PIECES = {
    "relu": "y = Relu(c)",
    "leaky relu": "y = LeakyRelu <alpha = 0.2> (c)",
    "relu6": "y = Clip(c, zero, six)",
    "clip": "y = Clip(c, minus, one)",
    "clip above": "y = Clip(c, , one)",
    "clip below": "y = Clip(c, minus)",
    "sigmoid": "y = Sigmoid(c)",
    "tanh": "y = Tanh(c)",
    "hard sigmoid": "y = HardSigmoid <alpha = 0.3, beta = 0.4> (c)",
    "hard swish": "y = HardSwish(c)",
    "hard swish spelled out": "t = Add(c, three) u = Clip(t, zero, six) w = Mul(c, u) y = Div(w, six)",
    "swish": "t = Sigmoid(c) y = Mul(c, t)",
    "gelu": "t = Mul(c, half) u = Erf(t) w = Add(u, one) y = Mul(c, w)",
    "softplus": "y = Softplus(c)",
    "elu": "y = Elu(c)",
    "exp log sqrt": "t = Exp(c) u = Add(t, one) w = Sqrt(u) y = Log(w)",
    "softmax": "y = Softmax <axis = 1> (c)",
    "log softmax": "y = LogSoftmax <axis = -1> (c)",
    "layer norm": "y = LayerNormalization <axis = -1> (c, w9, b9)",
    "instance norm": "y = InstanceNormalization(c, w4, b4)",
    "batch norm": "y = BatchNormalization(c, w4, b4, w4, six4)",
    "transpose": "y = Transpose <perm = [2, 0, 3, 1]> (c)",
    "flatten": "y = Flatten(c)",
    "reshape": "y = Reshape(c, shape)",
    "unsqueeze squeeze": "t = Unsqueeze(c, axis1) u = Neg(t) y = Squeeze(u, axis1)",
    "concat": "t = Relu(c) y = Concat <axis = 1> (c, t, c)",
    "split": "t, u = Split <axis = 1> (c, two_two) w = Neg(u) y = Mul(t, w)",
    "split unused": "t, u = Split <axis = -3> (c, two_two) y = Relu(u)",
    "slice": "y = Slice(c, from1, to7, axis2)",
    "slice steps": "y = Slice(c, from1, to7, axis2, steps2)",
    "slice backwards": "y = Slice(c, from7, to1, axis2, back)",
    "pad": "y = Pad(c, pads)",
    "pad reflect": 'y = Pad <mode = "reflect"> (c, pads)',
    "mean": "y = ReduceMean <axes = [2, 3], keepdims = 0> (c)",
    "sum": "y = ReduceSum(c, axis2)",
    "mean of all": "y = ReduceMean(c)",
    "max": "y = ReduceMax <axes = [2]> (c)",
    "global average": "y = GlobalAveragePool(c)",
    "global max": "y = GlobalMaxPool(c)",
    "max pool": "y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 0, 1]> (c)",
    "max pool dilated": "y = MaxPool <kernel_shape = [2, 2], dilations = [2, 3]> (c)",
    "max pool ceil": "y = MaxPool <kernel_shape = [3, 2], strides = [2, 2], ceil_mode = 1> (c)",
    "average pool": "y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 0, 1, 1]> (c)",
    "average pool full": "y = AveragePool <kernel_shape = [2, 3], pads = [1, 1, 1, 1], count_include_pad = 1> (c)",
    "average pool same": 'y = AveragePool <kernel_shape = [3, 3], strides = [2, 3], auto_pad = "SAME_UPPER"> (c)',
    "resize nearest": 'y = Resize <mode = "nearest"> (c, , scales)',
    "resize linear": 'y = Resize <mode = "linear"> (c, , scales)',
    "resize corners": 'y = Resize <mode = "linear", coordinate_transformation_mode = "align_corners"> (c, , , sizes)',
    "resize down": 'y = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric",'
    ' nearest_mode = "floor"> (c, , down)',
    "broadcast": "t = GlobalAveragePool(c) u = Mul(c, t) w = Sub(t, u) z = Add(w, w4c) y = Div(z, six4c)",
    "divide": "t = Exp(c) u = Add(t, one) w = ReduceSum(u, axis2) y = Div(c, w)",
    "expand": "t = ReduceMean <axes = [1]> (c) y = Expand(t, wide)",
    "power": "y = Pow(c, three)",
    "where": "t = Greater(c, one) y = Where(t, c, three)",
    "gather": "y = Gather <axis = 3> (c, axis1)",
    "matmul both": "t = Transpose <perm = [0, 1, 3, 2]> (c) y = MatMul(c, t)",
    "matmul broadcast": "t = ReduceMean <axes = [0, 1], keepdims = 0> (c) u = Transpose(t) y = MatMul(c, u)",
    "sum of three": "t = Tanh(c) u = GlobalAveragePool(c) y = Sum(c, t, u)",
    "round": "t = Floor(c) y = Mul(c, t)",
    "depth to space": "y = DepthToSpace <blocksize = 2> (c)",
}
CONSTANTS = (
    "float zero = {0}, float six = {6}, float one = {1}, float minus = {-0.5}, float three = {3}, "
    "float half = {0.7071}, int64[2] shape = {2, -1}, int64[1] axis1 = {1}, int64[2] two_two = {2, 2}, "
    "int64[2] axis2 = {2, -1}, int64[2] from1 = {1, -8}, int64[2] to7 = {7, 100}, int64[2] steps2 = {2, 3}, "
    "int64[2] from7 = {-1, 7}, int64[2] to1 = {1, -100}, int64[2] back = {-2, -1}, "
    "int64[8] pads = {0, 0, 1, 2, 0, 0, 3, 0}, "
    "float[4] scales = {1, 1, 2, 1.5}, int64[4] sizes = {2, 4, 13, 5}, float[4] down = {1, 1, 0.5, 0.34}, "
    "int64[4] wide = {2, 4, 8, 9}, float[4] six4 = {6, 5, 4, 3}, float[4, 1, 1] six4c = {6, 5, 4, 3}"
)


@pytest.mark.parametrize("piece", PIECES)
def test_rule_matches_central_differences(piece: str) -> None:
    text = f"""g (float[2, 3, 8, 9] x) => (y) <{CONSTANTS}> {{
        c = Conv <pads = [1, 1, 1, 1]> (x, kernel, b4)
        {PIECES[piece]}
    }}"""
    shapes = {"kernel": [4, 3, 3, 3], "w4": [4], "b4": [4], "w9": [9], "b9": [9], "w4c": [4, 1, 1]}
    model = text_model(text, shapes)
    step = 1e-3 if piece == "gelu" else 1e-6  # the reference evaluator computes Erf in float32
    assert_adjoint(model, ["c", "x"], {"x": 1.5 * sample([2, 3, 8, 9])}, step)


LAYERS = {
    "conv": ("Conv <pads = [1, 1, 1, 1]> (x, w)", [2, 4, 9, 8], [6, 4, 3, 3]),
    "pointwise": ("Conv(x, w)", [2, 4, 9, 8], [6, 4, 1, 1]),
    "groups": ("Conv <group = 2, pads = [1, 1, 1, 1]> (x, w)", [2, 4, 9, 8], [6, 2, 3, 3]),
    "depthwise": ("Conv <group = 4, pads = [1, 1, 1, 1]> (x, w)", [2, 4, 9, 8], [4, 1, 3, 3]),
    "depthwise multiplier": ("Conv <group = 4, strides = [2, 2]> (x, w)", [2, 4, 9, 8], [8, 1, 3, 3]),
    "stride": ("Conv <strides = [2, 3], pads = [1, 1, 1, 1]> (x, w)", [2, 4, 9, 8], [6, 4, 3, 3]),
    "stride leaves a rest": ("Conv <strides = [2, 3]> (x, w)", [2, 4, 10, 10], [6, 4, 3, 3]),
    "pointwise stride": ("Conv <strides = [2, 2]> (x, w)", [2, 4, 9, 8], [6, 4, 1, 1]),
    "depthwise stride": ("Conv <group = 4, strides = [2, 2], pads = [1, 1, 1, 1]> (x, w)", [2, 4, 9, 8], [4, 1, 3, 3]),
    "dilation": ("Conv <dilations = [2, 3], pads = [2, 1, 2, 1]> (x, w)", [2, 4, 12, 11], [6, 4, 3, 3]),
    "dilated stride": ("Conv <dilations = [2, 1], strides = [2, 2]> (x, w)", [2, 4, 12, 11], [6, 4, 3, 3]),
    "asymmetric": ("Conv <pads = [0, 2, 1, 0], strides = [1, 2]> (x, w)", [2, 4, 9, 8], [6, 4, 3, 2]),
    "wide padding": ("Conv <pads = [3, 3, 4, 2]> (x, w)", [2, 4, 9, 8], [6, 4, 2, 2]),
    "same upper": ('Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, w)', [2, 4, 9, 8], [6, 4, 3, 2]),
    "same lower": ('Conv <auto_pad = "SAME_LOWER", strides = [1, 2]> (x, w)', [2, 4, 9, 8], [6, 4, 2, 3]),
    "valid": ('Conv <auto_pad = "VALID"> (x, w)', [2, 4, 9, 8], [6, 4, 3, 3]),
    "conv 1d": ("Conv <strides = [3], pads = [2, 1]> (x, w)", [2, 4, 19], [6, 4, 5]),
    "conv 3d": ("Conv <strides = [1, 2, 1], pads = [1, 0, 1, 1, 0, 1]> (x, w)", [1, 2, 5, 6, 4], [3, 2, 3, 2, 3]),
    "transposed": ("ConvTranspose <strides = [2, 2], pads = [1, 0, 1, 1]> (x, w)", [2, 4, 5, 6], [4, 3, 3, 3]),
    "transposed to a shape": ("ConvTranspose <strides = [2], output_shape = [8]> (x, w)", [2, 4, 4], [4, 3, 3]),
    "transposed to a larger shape": ("ConvTranspose <strides = [2], output_shape = [10]> (x, w)", [2, 4, 4], [4, 3, 3]),
    "transposed groups": (
        "ConvTranspose <group = 2, strides = [2, 3], output_padding = [1, 1]> (x, w)",
        [2, 4, 5, 6],
        [4, 3, 3, 2],
    ),
    "gemm": ("Gemm <transB = 1, alpha = 0.5> (x, w)", [3, 5], [4, 5]),
    "gemm transposed": ("Gemm <transA = 1> (x, w)", [5, 3], [5, 4]),
    "gemm both transposed": ("Gemm <transA = 1, transB = 1> (x, w)", [5, 3], [4, 5]),
    "matmul": ("MatMul(x, w)", [2, 3, 5], [5, 4]),
    "matmul left": ("MatMul(w, x)", [2, 5, 3], [4, 5]),
    "matmul vector": ("MatMul(x, w)", [2, 3, 5], [5]),
    "relu": ("Relu(x)", [2, 3, 5], []),
    "clip": ("Clip(x, low, high)", [2, 3, 5], []),
}


def layer_model(layer: str) -> tuple[onnx.ModelProto, dict[str, Array]]:
    text, shape, weight = LAYERS[layer]
    kind = ", ".join(map(str, shape))
    constants = "float low = {-0.3}, float high = {0.8}"
    model = text_model(f"g (float[{kind}] x) => (y) <{constants}> {{ y = {text} }}", {"w": weight})
    return onnx.shape_inference.infer_shapes(model), {"x": sample(shape)}


# The reference evaluator has no grouped ConvTranspose, and puts odd padding elsewhere; onnx-ad refuses auto_pad, shifts
# asymmetric pads, and knows no output larger than its windows.
NO_REFERENCE = {"transposed groups", "transposed to a shape"}
NOT_IN_ONNX_AD = {"same upper", "same lower", "asymmetric", "wide padding", "conv 1d", "transposed to a larger shape"}


@pytest.mark.parametrize("layer", [name for name in LAYERS if name not in NO_REFERENCE])
def test_layer_matches_central_differences(layer: str) -> None:
    model, feeds = layer_model(layer)
    assert_adjoint(model, ["x"], feeds)


@pytest.mark.parametrize("layer", [name for name, x in LAYERS.items() if x[2] and name not in NO_REFERENCE])
def test_adjoints_of_a_computed_weight(layer: str) -> None:
    model, feeds = layer_model(layer)
    (weight,) = (numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "w")
    del model.graph.initializer[:]
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, weight.shape))
    assert_adjoint(model, ["x", "w"], feeds | {"w": weight})


# Bias of a Conv, a table, and scalars that all elements share.
INPUTS = {
    "bias": ("y = Conv(x, kernel, p)", [6]),
    "table": ("i = Cast <to = 7> (x) y = Gather(p, i)", [3, 2]),
    "factor": ("y = Mul(x, p)", [1]),
    "divisor": ("t = Exp(p) y = Div(x, t)", [1]),
    "added": ("y = Add(x, p)", [1]),
}


@pytest.mark.parametrize("piece", INPUTS)
def test_adjoint_of_a_parameter(piece: str) -> None:
    body, shape = INPUTS[piece]
    kind = ", ".join(map(str, shape))
    text = f"g (float[2, 4, 5, 5] x, float[{kind}] p) => (y) {{ {body} }}"
    model = onnx.shape_inference.infer_shapes(text_model(text, {"kernel": [6, 4, 3, 3]}))
    x = sample([2, 4, 5, 5])
    assert_adjoint(model, ["p"], {"x": np.abs(x) % 3 if piece == "table" else x, "p": sample(shape, 5)})


def test_a_straight_round_passes_adjoints_on() -> None:
    model = text_model("g (float[2, 3] x) => (y) { t = Round(x) y = Mul(t, t) }", {})
    feeds = {"x": sample([2, 3])}
    result = straight_through(model, ["x"], ["y"], feeds, RUNTIME)
    seeds = seeds_for(result, np.random.default_rng(0))
    found = gradients(result, feeds, seeds)["x"]
    np.testing.assert_allclose(found, 2 * np.rint(feeds["x"]) * seeds[result.seeds["y"]], rtol=1e-6)


@pytest.mark.parametrize("layer", [name for name in LAYERS if name not in NOT_IN_ONNX_AD])
def test_same_as_onnx_ad(layer: str) -> None:
    model, feeds = layer_model(layer)
    result = reverse(model, ["x"], feeds)
    seeds = seeds_for(result, np.random.default_rng(0))
    mine = gradients(result, feeds, seeds)["x"]
    theirs = onnx_ad.reverse(model, ["x"], layout="onnx")
    (expected,) = session(theirs).run(["adj_x"], {**feeds, "adj_y": seeds[result.seeds["y"]][..., None]})
    np.testing.assert_allclose(mine, expected[..., 0], rtol=1e-6, atol=1e-6 * float(np.abs(expected).max()))


# --- the graph that comes out ---


def test_missing_rule_has_a_reason_and_the_rest_works() -> None:
    model = text_model(
        """g (float[2, 3, 8, 8] x) => (y, o) <int64[8] pads = {0, 0, 1, 1, 0, 0, 1, 1}> {
            a = Conv(x, w1) b = Pad <mode = "edge"> (a, pads) c = Conv(b, w2) y = Relu(c) d = Tanh(a) o = Exp(d)
        }""",
        {"w1": [4, 3, 3, 3], "w2": [2, 4, 3, 3]},
    )
    model.graph.node[1].name = "edges"
    feeds = {"x": sample([2, 3, 8, 8])}
    result = reverse(model, ["c", "a", "x", "d", "nowhere"], feeds)
    reason = "no adjoint rule for operator Pad (node edges)"
    assert result.missing == {"a": reason, "x": reason, "nowhere": "no tensor nowhere in the graph"}
    assert list(result.adjoints) == ["c", "d"]
    grads = gradients(result, feeds, seeds_for(result, np.random.default_rng(0)))
    assert all(grad.any() for grad in grads.values())


@pytest.mark.parametrize("taken", [True, False])
def test_a_tensor_consumed_only_by_subgraphs(taken: bool) -> None:
    model = text_model(
        """g (float[1, 4] x, bool b) => (y) {
            a = Relu(x) c = Sigmoid(a)
            t = If (b) <then_branch = p () => (float[1, 4] u) { u = Neg(a) },
                        else_branch = q () => (float[1, 4] v) { w = Exp(a) v = Mul(w, c) }>
            y = Tanh(t)
        }""",
        {},
    )
    feeds = {"x": sample([1, 4]), "b": np.array(taken)}
    assert reverse(model, ["b"], feeds).missing == {"b": "tensor b is not of a float type"}
    assert_adjoint(model, ["t", "a", "x"], feeds)


def test_a_scan() -> None:
    model = text_model(
        """g (float[2, 3] s, float[4, 2, 5] x) => (last, y) {
            a = Relu(x) b = Tanh(s)
            last, y = Scan <num_scan_inputs = 1, body = g (float[2, 3] before, float[2, 5] v) =>
                (float[2, 3] after, float[2, 3] o) {
                    p = MatMul(v, w) q = Add(p, before) after = Tanh(q) o = Mul(after, p)
                }> (b, a)
        }""",
        {"w": [5, 3]},
    )
    assert_adjoint(model, ["a", "b", "x", "s"], {"s": sample([2, 3]), "x": sample([4, 2, 5])})


def test_a_loop() -> None:
    model = text_model(
        """g (float[2, 3] x) => (y) <int64 three = {3}, bool yes = {1}> {
            a = Relu(x)
            y = Loop <body = body (int64 i, bool before, float[2, 3] s) => (bool after, float[2, 3] t) {
                after = Identity(before) u = MatMul(s, w) v = Add(u, a) t = Tanh(v)
            }> (three, yes, a)
        }""",
        {"w": [3, 3]},
    )
    assert_adjoint(model, ["a", "x"], {"x": sample([2, 3])})


def test_recurrent_layers() -> None:
    """onnx-ad turns each into a Scan, with the same names inside."""
    model = text_model(
        """g (float[5, 3, 4] x) => (y) <int64[1] axis1 = {1}> {
            a = Relu(x)
            b = LSTM <hidden_size = 6> (a, w1, r1, b1) c = Squeeze(b, axis1)
            d = GRU <hidden_size = 6, linear_before_reset = 1> (c, w2, r2, b2) e = Squeeze(d, axis1)
            f, last = LSTM <hidden_size = 6> (e, w3, r1, b1) g = Squeeze(f, axis1)
            h = RNN <hidden_size = 6> (g, w4, w4, b4) i = Squeeze(h, axis1)
            y = Add(i, last)
        }""",
        {
            "w1": [1, 24, 4],
            "r1": [1, 24, 6],
            "b1": [1, 48],
            "w2": [1, 18, 6],
            "r2": [1, 18, 6],
            "b2": [1, 36],
            "w3": [1, 24, 6],
            "w4": [1, 6, 6],
            "b4": [1, 12],
        },
    )
    assert_adjoint(model, ["a", "c", "e", "x"], {"x": sample([5, 3, 4])})


def test_several_outputs_one_of_them_an_integer() -> None:
    model = text_model(
        """g (float[2, 3, 8, 8] x, int64[2] i) => (p, r, k) {
            c = Conv(x, w1) r = Relu(c) d = Conv(r, w2) p = Sigmoid(d) k = Add(i, i)
        }""",
        {"w1": [4, 3, 3, 3], "w2": [2, 4, 3, 3]},
    )
    feeds = {"x": sample([2, 3, 8, 8]), "i": np.array([1, 2])}
    result = reverse(model, ["c", "r", "d", "p"], feeds, fetch=["d"])
    assert set(result.seeds) == {"p", "r"}
    assert [o.name for o in result.model.graph.output][:4] == ["p", "r", "k", "d"]
    assert [i.name for i in result.model.graph.input] == ["x", "i", *result.seeds.values()]
    assert_adjoint(model, ["c", "r", "d", "p"], feeds)


def test_outputs_and_fetched_tensors_are_those_of_the_model() -> None:
    model, feeds = layer_model("depthwise stride")
    result = reverse(model, ["x"], feeds)
    seeds = seeds_for(result, np.random.default_rng(0))
    (before,) = session(model).run(["y"], feeds)
    (after,) = session(result.model).run(["y"], {**feeds, **seeds})
    np.testing.assert_array_equal(before, after)


def test_model_is_not_changed() -> None:
    model, feeds = layer_model("stride")
    before = model.SerializeToString(deterministic=True)
    reverse(model, ["x"], feeds)
    assert model.SerializeToString(deterministic=True) == before


def test_no_adjoints_of_parameters_or_above_the_wanted_tensors() -> None:
    model = text_model(
        "g (float[1, 3, 8, 8] x) => (y) { a = Conv(x, w1) b = Relu(a) c = Conv(b, w2) y = Clip(c, low, high) }",
        {"w1": [4, 3, 3, 3], "w2": [4, 4, 3, 3], "low": [], "high": []},
    )
    result = reverse(model, ["b"], {"x": sample([1, 3, 8, 8])})
    kinds = [node.op_type for node in result.model.graph.node]
    assert kinds.count("Conv") == 3  # two forward, one back
    assert not {"Transpose", "Where", "ReduceSum", "ConvTranspose", "Sign"} & set(kinds)


RELUS = """g (float[2, 3, 9, 9] x) => (y) {
    a = Conv(x, w1) b = Conv(x, w2) p = Relu(a) q = Relu(b) c = Concat <axis = 1> (p, q)
    m = MaxPool <kernel_shape = [3, 3], strides = [2, 2]> (c) y = Conv(m, w3)
}"""


@pytest.mark.parametrize(("at", "masks"), [("a b m", 1), ("a b c", 1), ("a b p", 2), ("a b q m", 2), ("x", 1)])
def test_relu_masks_move_behind_operators_that_commute(at: str, masks: int) -> None:
    model = text_model(RELUS, {"w1": [4, 3, 3, 3], "w2": [2, 3, 3, 3], "w3": [3, 6, 2, 2]})
    feeds = {"x": sample([2, 3, 9, 9])}
    result = reverse(model, at.split(), feeds)
    steep = [n for n in result.model.graph.node if n.op_type == "HardSigmoid" and n.attribute[0].f > 0]
    assert len(steep) == masks
    assert_adjoint(model, at.split(), feeds)


def test_a_max_pooling_runs_once() -> None:
    model = text_model(RELUS, {"w1": [4, 3, 3, 3], "w2": [2, 3, 3, 3], "w3": [3, 6, 2, 2]})
    kinds = [node.op_type for node in reverse(model, ["x"], {"x": sample([2, 3, 9, 9])}).model.graph.node]
    assert kinds.count("MaxPool") == 1


def test_operands_of_an_add_share_one_output() -> None:
    model = text_model("g (float[1, 4] x) => (y) { a = Relu(x) b = Tanh(x) y = Add(a, b) }", {})
    result = reverse(model, ["a", "b"], {"x": sample([1, 4])})
    assert result.adjoints["a"] == result.adjoints["b"]


def test_unreached_tensor_has_a_zero_adjoint() -> None:
    model = text_model("g (float[1, 4] x) => (y, z) { a = Floor(x) y = Neg(a) z = ArgMax(x) }", {})
    feeds = {"x": sample([1, 4])}
    result = reverse(model, ["x"], feeds)
    grads = gradients(result, feeds, seeds_for(result, np.random.default_rng(0)))
    np.testing.assert_array_equal(grads["x"], np.zeros((1, 4)))


@pytest.mark.parametrize("opset", [13, 15, 18, 21])
def test_opsets(opset: int) -> None:
    model = text_model(
        f"""g (float[2, 3, 8, 8] x) => (y) <{CONSTANTS}> {{
            c = Conv(x, w) m = MaxPool <kernel_shape = [3, 3], strides = [1, 2]> (c) n = Softmax <axis = 1> (m)
            s = ReduceSum(n, axis2) y = Clip(s, zero, one)
        }}""",
        {"w": [4, 3, 3, 3]},
        opset,
    )
    assert_adjoint(model, ["c", "m", "n"], {"x": sample([2, 3, 8, 8])})


def test_samples_do_not_mix() -> None:
    """One pass over a batch gives each sample the g that it has alone."""
    model, feeds = layer_model("depthwise stride")
    result = reverse(model, ["x"], feeds)
    seeds = seeds_for(result, np.random.default_rng(0))
    (seed,) = seeds
    both = gradients(result, feeds, seeds)["x"]
    seeds[seed][1] = 0
    first = gradients(result, feeds, seeds)["x"]
    np.testing.assert_array_equal(first[0], both[0])
    assert not first[1].any()


# --- real models ---

MODELS = {
    "resnet20": ("cifar10/resnet20.onnx", [4, 3, 32, 32]),
    "mobilenet_v2": ("imagenet/mobilenet_v2.onnx", [2, 3, 224, 224]),
    "squeezenet": ("imagenet/squeezenet1_1.onnx", [2, 3, 224, 224]),
    "orientation": ("orientation/model.onnx", [1, 3, 224, 224]),
    "ppocr_cls": ("ppocr_cls/model.onnx", [2, 3, 48, 192]),
    "ppocr_det": ("ppocr_det/model.onnx", [2, 3, 96, 96]),
    "magika": ("magika/model.onnx", [2, 2048]),
    "basic_pitch": ("basic_pitch/model.onnx", [2, 43844, 1]),
}
IN_DOUBLE = {"resnet20", "orientation", "ppocr_cls", "ppocr_det"}
SATURATED = {"ppocr_cls", "ppocr_det"}  # float32's Softmax and Sigmoid leave g a relative error of 5 %


def real_model(name: str) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A static measuring copy, and a batch: real samples where they are arrays, else noise."""
    path, shape = MODELS[name]
    model = onnx.load(ZOO / path)
    if model.opset_import[0].version < 13:
        model = onnx.version_converter.convert_version(model, 13)
    constants = {tensor.name for tensor in model.graph.initializer}
    (value,) = (v for v in model.graph.input if v.name not in constants)
    for dim, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
        dim.dim_value = size
    calib = (ZOO / path).with_name("calib.npz")
    if calib.is_file():
        with np.load(calib) as arrays:
            array = arrays[value.name if value.name in arrays else arrays.files[0]][: shape[0]]
            if list(array.shape) == shape and name != "basic_pitch":  # begins in silence: sqrt(0), log(0)
                return RUNTIME.optimized(model), {value.name: array}
    return RUNTIME.optimized(model), {value.name: sample(shape)}


def layer_tensors(model: onnx.ModelProto) -> list[str]:
    """Outputs of the layers with constant weights, and the activations that they read."""
    constants = {tensor.name for tensor in model.graph.initializer} | {v.name for v in model.graph.input}
    layers = [n for n in model.graph.node if n.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
    layers = [n for n in layers if n.input[1] in constants]
    return list(
        dict.fromkeys([*(n.output[0] for n in layers), *(n.input[0] for n in layers if n.input[0] not in constants)])
    )


def directional(
    network: Callable[[dict[str, Array]], Sequence[Array]], seeds: Sequence[Array], name: str, delta: Array
) -> float:
    """<v, F~(delta) - F~(-delta)> / 2."""
    values = zip(seeds, network({name: delta}), network({name: -delta}), strict=True)
    return sum(float(np.vdot(v.astype(np.float64), np.float64(up) - np.float64(down))) / 2 for v, up, down in values)


@zoo
@pytest.mark.parametrize("name", MODELS)
def test_zoo_model_has_the_right_slope(name: str) -> None:
    """Check slopes along a random d, at a few tensors spread over the network.

    In float64 if the reference evaluator runs the model in reasonable time. In float32, take the best of several steps:
    large ones suffer from curvature and kinks, small ones from rounding.
    """
    exact = name in IN_DOUBLE
    model, feeds = real_model(name)
    at = layer_tensors(model)
    result = reverse(model, at, feeds)
    assert result.missing == {}
    rng = np.random.default_rng(0)
    seeds = seeds_for(result, rng)
    grads = gradients(result, feeds, seeds)
    assert all(np.isfinite(g).all() for g in grads.values())
    if name in SATURATED:
        wide = {k: v.astype(np.float64) for k, v in {**feeds, **seeds}.items()}
        values = ReferenceEvaluator(in_double(result.model)).run(list(result.adjoints.values()), wide)
        grads = dict(zip(result.adjoints, values, strict=True))
    chosen = {tensor: grads[tensor].shape for tensor in at[:: max(len(at) // 3, 1)]}
    if exact:
        modified = ReferenceEvaluator(with_adds(in_double(model), chosen, TensorProto.DOUBLE))
    else:
        modified = session(with_adds(model, chosen, TensorProto.FLOAT))
    kind = np.float64 if exact else np.float32
    base = {k: v.astype(kind) if v.dtype == np.float32 else v for k, v in feeds.items()}
    base.update({f"add {tensor}": np.zeros(shape, kind) for tensor, shape in chosen.items()})

    def network(deltas: dict[str, Array]) -> list[Array]:
        adds = {f"add {tensor}": delta.astype(kind) for tensor, delta in deltas.items()}
        return list(modified.run(list(result.seeds), {**base, **adds}))

    for tensor in chosen:
        g = grads[tensor].astype(np.float64)
        direction = g / np.abs(g).max() + 0.1 * rng.standard_normal(g.shape)
        expected = float(np.vdot(g, direction))
        errors = []
        for step in (1e-7,) if exact else (1e-1, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4):
            slope = directional(network, [seeds[s] for s in result.seeds.values()], tensor, step * direction) / step
            errors.append(abs(slope / expected - 1))
        assert min(errors) < (1e-3 if exact else 0.02), (tensor, errors)


def test_an_output_with_wrong_declared_sizes() -> None:
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (float[2, 3] x) => (float[7, 5] y) { a = Tanh (x) y = Relu (a) }""")
    feeds = {"x": np.ones((2, 3), np.float32)}
    result = reverse_model(model, ["a"], ["y"], feeds=feeds, runtime=RUNTIME)
    (seed,) = (i for i in result.model.graph.input if i.name == result.seeds["y"])
    assert [d.dim_value for d in seed.type.tensor_type.shape.dim] == [2, 3]

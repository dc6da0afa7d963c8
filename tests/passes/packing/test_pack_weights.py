"""Weights in few bits: the same tensors at every level, folded when a session is made, no larger than promised."""

import math

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, checker, numpy_helper, parser

from rdoq_onnx.errors import ModelError
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.packing import bit_rows, pack_weights, sub_byte_parts
from rdoq_onnx.passes.packing.pack_weights import PackWeights
from rdoq_onnx.system.runtime import Runtime

STORAGES = {
    "packed": {},
    "native": {"storage": "native"},
    "native without INT2": {"storage": "native", "int2": False},
}
LEVELS = ("none", "basic", "all")
RUNTIME = Runtime("cpu", 1)


@pytest.fixture(scope="module", autouse=True)
def small_weights_too():
    """Weights as small as those of these tests save less than the nodes take that decode them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bit_rows, "_GROUP_NODES", -1000)
        patch.setattr(bit_rows, "_SHARED_NODES", 0)
        patch.setattr(sub_byte_parts, "_PART_NODES", -1000)
        yield


def integers(shape, axis, bits, shift, seed=0):
    """Random integers, each channel's from its window, and both ends of it where the channel has room for them."""
    bits, shift = np.broadcast_to(bits, shape[axis]), np.broadcast_to(shift, shape[axis])
    shift = np.where((bits == 0) | (bits == 8), 0, shift)
    low = shift - (1 << bits.astype(int)) // 2
    rows = np.random.default_rng(seed).integers(0, 256, (shape[axis], math.prod(shape) // shape[axis]))
    rows = rows % (1 << bits.astype(int))[:, None]
    rows[:, 0] = 0
    rows[:, -1] = (1 << bits.astype(int)) - 1
    rows = (rows + low[:, None]).astype(np.int8)
    rest = [n for k, n in enumerate(shape) if k != axis]
    return np.ascontiguousarray(np.moveaxis(rows.reshape(shape[axis], *rest), 0, axis))


def model_of(graph, tensors, opset=17):
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> {graph}')
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in tensors.items())
    return model


def decoders(weights, opset=13):
    """A model that gives nothing but the INT8 tensors; `weights` as {name: (integers, axis)}. It takes no input."""
    outputs = ", ".join(f"int8[{','.join(map(str, w.shape))}] {n}_y" for n, (w, _) in weights.items())
    # The axis is told by a reader like a layer's; the output is the tensor itself.
    lines = [
        f"{n}_y = Identity ({n}) {n}_f = DequantizeLinear <axis = {axis}> ({n}, {n}_s)"
        for n, (_, axis) in weights.items()
    ]
    tensors = {n: w for n, (w, _) in weights.items()}
    tensors |= {f"{n}_s": np.ones(w.shape[a], np.float32) for n, (w, a) in weights.items()}
    return model_of(f"g () => ({outputs}) {{ {' '.join(lines)} }}", tensors, opset)


def packed_equal(ort_run, weights, levels=LEVELS, **options):
    model = decoders(weights)
    packed = run_passes([PackWeights(list(weights), **options)], model)
    checker.check_model(packed, full_check=True)
    for level in levels:
        for got, (expected, _) in zip(ort_run(packed, {}, level), weights.values(), strict=True):
            assert got.dtype == np.int8
            np.testing.assert_array_equal(got, expected)
    return packed


def rows_and_codes(model):
    """The rows of bytes of each group, by rising K, and the bytes of the channels."""
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    stored = {
        op: [tensors[n.input[0]] for n in model.graph.node if n.op_type == op and n.input[0] in tensors]
        for op in ("Gather", "Cast")
    }
    rows = [tensor for tensor in stored["Gather"] if tensor.dtype == np.uint8 and tensor.ndim == 2]
    return sorted(rows, key=lambda r: r.shape[1]), stored["Cast"][0].ravel()


def ops(model):
    return [n.op_type for n in model.graph.node]


@st.composite
def weight_sets(draw):
    """Tensors of one to five dimensions, any axis, each channel with a width and window of its own."""
    weights = {}
    for k in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=5)))
        axis = draw(st.integers(0, len(shape) - 1))
        bits = np.array(draw(st.lists(st.integers(0, 8), min_size=shape[axis], max_size=shape[axis])))
        shift = np.array(draw(st.lists(st.integers(0, 1), min_size=shape[axis], max_size=shape[axis])))
        weights[f"w{k}"] = (integers(shape, axis, bits, shift, seed=k), axis)
    return weights


@pytest.mark.parametrize("storage", STORAGES)
@settings(max_examples=40, deadline=None)
@given(weights=weight_sets())
def test_every_tensor_comes_back_bit_for_bit(ort_run, storage, weights):
    packed_equal(ort_run, weights, levels=("none", "all"), **STORAGES[storage])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("bits", range(9))
def test_each_width_alone(ort_run, storage, bits, shift):
    packed_equal(ort_run, {"w": (integers((5, 4, 3), 0, bits, shift), 0)}, **STORAGES[storage])


@pytest.mark.parametrize("storage", STORAGES)
def test_values_decide_not_widths(ort_run, storage):
    """All 256 integers, the ends of each window, and what just does not fit into it."""
    edges = [0, 0, -1, 0, 0, 1, -2, 1, -1, 2, -3, 0, -4, 4, -128, 127, 127, 127, -128, -128, 64, 64, -65, 0]
    weights = {
        "all": (np.arange(-128, 128, dtype=np.int8).reshape(2, 128), 1),
        "edges": (np.array(edges, np.int8).reshape(-1, 2), 0),
    }
    packed_equal(ort_run, weights, **STORAGES[storage])


@pytest.mark.parametrize("storage", STORAGES)
def test_decode_is_folded(storage):
    weights = {"w": (integers((6, 4, 3), 1, [0, 2, 5, 8], [0, 1, 0, 0]), 1), "v": (integers((6, 4), 0, 3, 1), 0)}
    packed = run_passes([PackWeights(list(weights), **STORAGES[storage])], decoders(weights))
    for level in ("basic", "all"):
        assert not set(ops(RUNTIME.optimized(packed, level))) - {"Identity", "DequantizeLinear"}


def test_weights_beyond_the_cap_are_decoded_apart(ort_run, monkeypatch):
    weights = {f"w{k}": (integers((4, 5 + k % 2), 0, [0, 3, 5, 1 + k], 0, seed=k), 0) for k in range(5)}
    together = packed_equal(ort_run, weights)
    monkeypatch.setattr(bit_rows, "_TOGETHER", 50)
    apart = packed_equal(ort_run, weights)
    assert ops(together).count("MatMulInteger") == 2
    assert ops(apart).count("MatMulInteger") == 3


def test_weight_too_large_to_fold_stays(ort_run, monkeypatch):
    monkeypatch.setattr(pack_weights, "_FOLDABLE", 30)
    weights = {"small": (integers((4, 5), 0, 2, 0), 0), "large": (integers((4, 8), 0, 2, 0), 0)}
    packed = packed_equal(ort_run, weights)
    assert [t.name for t in packed.graph.initializer if t.name in weights] == ["large"]


@pytest.mark.parametrize("storage", STORAGES)
def test_nothing_to_pack(storage):
    weights = {"w": (integers((4, 5), 0, 8, 0), 0)}
    model = decoders(weights)
    assert run_passes([PackWeights([], **STORAGES[storage])], model) == model
    assert run_passes([PackWeights(["w"], **STORAGES[storage])], model) == model


def test_what_saves_less_than_its_nodes_take_stays(ort_run, monkeypatch):
    weights = {"small": (integers((4, 9), 0, 3, 0), 0), "large": (integers((50, 60), 0, 3, 0), 0)}
    monkeypatch.setattr(bit_rows, "_GROUP_NODES", 350)
    packed = packed_equal(ort_run, weights)
    assert [t.name for t in packed.graph.initializer if t.name in weights] == ["small"]
    monkeypatch.setattr(bit_rows, "_SHARED_NODES", 2000)
    model = decoders(weights)
    assert run_passes([PackWeights(list(weights))], model) == model
    monkeypatch.setattr(sub_byte_parts, "_PART_NODES", 90)
    native = packed_equal(ort_run, weights, storage="native")
    assert [t.name for t in native.graph.initializer if t.name in weights] == ["small"]


def test_channels_of_zero_bits_alone_and_last(ort_run):
    """A group has two rows of bytes at least, so that what is fetched for a channel of no bits is there."""
    weights = {
        "w": (np.zeros((16, 3, 3), np.int8), 0),
        "v": (np.zeros((4, 6), np.int8), 1),
        "u": (integers((6, 7), 0, [3, 5, 0, 0, 0, 0], 0), 0),
    }
    rows, codes = rows_and_codes(packed_equal(ort_run, weights))
    assert [r.shape for r in rows] == [(2, 4), (2, 7), (2, 9)]
    assert codes.nbytes == 6 + 1 + 6 + 1 + 16 + 1


@pytest.mark.parametrize("bad", ["s", "gone", "x"])
def test_what_is_no_int8_initializer_is_refused(bad):
    model = decoders({"w": (integers((4, 5), 0, 3, 0), 0)})
    with pytest.raises(ModelError, match="not an INT8 initializer"):
        run_passes([PackWeights(["w", bad])], model)


def test_opsets_rise_no_further_than_the_types_need(ort_run):
    def opset(bits, shift=0, **options):
        packed = packed_equal(ort_run, {"w": (integers((4, 6), 0, bits, shift), 0)}, **options)
        return packed.opset_import[0].version, packed.ir_version

    assert opset([0, 2, 3, 7]) == (13, 8)
    assert opset(8, storage="native") == (13, 8)
    assert opset([3, 4, 8, 7], storage="native") == (21, 10)
    assert opset(2, 1, storage="native")[0] == 21
    assert opset([2, 0, 4, 8], storage="native") == (25, 13)
    assert opset([2, 0, 4, 8], storage="native", int2=False) == (21, 10)


def test_native_containers(ort_run):
    """The smallest that holds a channel; a permutation only where there is more than one."""
    weights = {"w": (integers((6, 5), 0, [0, 2, 2, 4, 8, 3], [0, 0, 1, 1, 0, 0]), 0)}
    packed = packed_equal(ort_run, weights, storage="native")
    dims = {t.data_type: tuple(t.dims) for t in packed.graph.initializer if t.name.startswith("w_part")}
    # 2 bits with h = 1 reach up to 2, 4 bits with h = 1 up to 8: the next container.
    assert dims[TensorProto.INT2] == (2, 5)
    assert dims[TensorProto.INT4] == (2, 5)
    assert dims[TensorProto.INT8] == (2, 5)
    alone = packed_equal(ort_run, {"w": (integers((4, 6), 1, [3, 4, 4, 3, 3, 4], 0), 1)}, storage="native")
    assert sorted(ops(alone)) == ["Cast", "DequantizeLinear", "Identity"]
    assert sum(len(t.raw_data) for t in alone.graph.initializer if t.data_type == TensorProto.INT4) == 12


QDQ = "{0}_q = QuantizeLinear ({0}, xs, xz) {0}_d = DequantizeLinear ({0}_q, xs, xz)"
NETS = {
    # name: (input, output, nodes, weight shape, channel axis, bias, kernel that fuses)
    "Conv": ((2, 4, 6, 6), (2, 6, 4, 4), "y = Conv (x_d, w_d, b_d)", (6, 4, 3, 3), 0, "QLinearConv"),
    "Conv 1-D": ((2, 4, 9), (2, 6, 7), "y = Conv (x_d, w_d, b_d)", (6, 4, 3), 0, "QLinearConv"),
    "depthwise": ((2, 6, 6, 6), (2, 6, 4, 4), "y = Conv <group = 6> (x_d, w_d, b_d)", (6, 1, 3, 3), 0, "QLinearConv"),
    "grouped": ((2, 4, 6, 6), (2, 6, 4, 4), "y = Conv <group = 2> (x_d, w_d, b_d)", (6, 2, 3, 3), 0, "QLinearConv"),
    "ConvTranspose": ((2, 4, 3, 3), (2, 6, 4, 4), "y = ConvTranspose (x_d, w_d)", (4, 6, 2, 2), 1, None),
    "Gemm": ((2, 5), (2, 6), "y = Gemm (x_d, w_d, b_d)", (5, 6), 1, "QGemm"),
    "Gemm transB": ((2, 5), (2, 6), "y = Gemm <transB = 1> (x_d, w_d, b_d)", (6, 5), 0, "QGemm"),
    "MatMul": ((2, 3, 5), (2, 3, 6), "y = MatMul (x_d, w_d)", (5, 6), 1, "QLinearMatMul"),
    "MatMul left": ((2, 5, 3), (2, 6, 3), "y = MatMul (w_d, x_d)", (6, 5), 0, None),
}


def layer(kind, bits, shift, opset=17):
    """A layer as InsertQDQ leaves it, with quantized activations; feeds."""
    shape_in, shape_out, node, shape, axis, _ = NETS[kind]
    rng = np.random.default_rng(1)
    scales = rng.uniform(0.01, 0.02, 6).astype(np.float32)
    graph = f"""g (float[{",".join(map(str, shape_in))}] x) => (float[{",".join(map(str, shape_out))}] y_d)
        {{ {QDQ.format("x")} w_d = DequantizeLinear <axis = {axis}> (w, ws, wz)
          bs = Mul (ws, xs) b_d = DequantizeLinear <axis = 0> (b, bs) {node}
          y_q = QuantizeLinear (y, ys, xz) y_d = DequantizeLinear (y_q, ys, xz) }}"""
    tensors = {
        "w": integers(shape, axis, bits, shift),
        "ws": scales,
        "wz": np.zeros(6, np.int8),
        "b": rng.integers(-900, 900, 6).astype(np.int32),
        "xs": np.array(0.02, np.float32),
        "xz": np.array(7, np.uint8),
        "ys": np.array(0.05, np.float32),
    }
    return model_of(graph, tensors, opset), {"x": rng.standard_normal(shape_in).astype(np.float32)}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", NETS)
def test_layers_compute_and_fuse_as_with_int8(ort_run, kind, storage):
    model, feeds = layer(kind, np.array([0, 1, 2, 3, 5, 7]), np.array([0, 1, 0, 1, 0, 0]))
    packed = run_passes([PackWeights(["w"], **STORAGES[storage])], model)
    if storage == "packed":
        assert packed.opset_import == model.opset_import
    for level in LEVELS:
        np.testing.assert_array_equal(ort_run(packed, feeds, level)[0], ort_run(model, feeds, level)[0])
    kernels = ops(RUNTIME.optimized(packed, "all"))
    if storage == "packed":
        assert sorted(kernels) == sorted(ops(RUNTIME.optimized(model, "all")))
    fused = NETS[kind][-1]
    assert fused is None or fused in kernels
    assert not {"MatMulInteger", "Gather", "CumSum", "Split", "Cast", "Concat"} & set(kernels)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(("shape", "axis"), [((6, 4, 3, 3), 0), ((4, 6, 2, 2), 1), ((6, 5), 0), ((5, 6), 1)])
def test_float_activations(ort_run, shape, axis, storage):
    """Cast and Mul fold to a float weight; the axis is that of the scales."""
    w = integers(shape, axis, np.array([0, 1, 2, 3, 5, 6]), 0)
    scales = np.linspace(0.01, 0.02, 6, dtype=np.float32).reshape(-1, *[1] * (len(shape) - axis - 1))
    sizes = ",".join(map(str, shape))
    graph = f"g (float[{sizes}] x) => (float[{sizes}] y) {{ c = Cast <to = 1> (w) f = Mul (c, s) y = Add (x, f) }}"
    model = model_of(graph, {"w": w, "s": scales})
    packed = run_passes([PackWeights(["w"], **STORAGES[storage])], model)
    if storage == "packed":
        assert (rows_and_codes(packed)[1][:-1] // 2).tolist() == [0, 1, 2, 3, 5, 6]
    feeds = {"x": np.zeros(shape, np.float32)}
    for level in LEVELS:
        np.testing.assert_array_equal(ort_run(packed, feeds, level)[0], (w * scales).astype(np.float32))
    assert ops(RUNTIME.optimized(packed, "basic")) == ["Add"]


@pytest.mark.parametrize("storage", STORAGES)
def test_weight_shared_by_two_layers_is_decoded_once(ort_run, storage):
    graph = """g (float[2, 4] x) => (float[2, 4] y)
        { d = DequantizeLinear <axis = 1> (w, s, z) a = MatMul (x, d) t = Tanh (a)
          e = DequantizeLinear <axis = 1> (w, s, z) y = MatMul (t, e) }"""
    w = integers((4, 4), 1, np.array([0, 2, 3, 6]), 0)
    model = model_of(graph, {"w": w, "s": np.full(4, 0.1, np.float32), "z": np.zeros(4, np.int8)})
    packed = run_passes([PackWeights(["w"], **STORAGES[storage])], model)
    assert not any(t.data_type == TensorProto.INT8 and tuple(t.dims) == (4, 4) for t in packed.graph.initializer)
    assert len({n.input[0] for n in packed.graph.node if n.op_type == "DequantizeLinear"}) == 1
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)}
    for level in LEVELS:
        np.testing.assert_array_equal(ort_run(packed, feeds, level)[0], ort_run(model, feeds, level)[0])


def test_other_weights_and_metadata_stay():
    model = decoders({"w": (integers((4, 5), 0, 3, 0), 0), "v": (integers((4, 5), 0, 3, 0), 0)})
    onnx.helper.set_model_props(model, {"key": "value"})
    for options in STORAGES.values():
        packed = run_passes([PackWeights(["w"], **options)], model)
        assert [t.name for t in packed.graph.initializer if t.name in "wv"] == ["v"]
        assert {p.key: p.value for p in packed.metadata_props} == {"key": "value"}

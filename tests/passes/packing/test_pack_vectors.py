"""Scales and biases in half precision: the same numbers, the same kernels, and nothing that is not exact."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, checker, numpy_helper, parser

from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.packing.pack_vectors import PackVectors
from rdoq_onnx.passes.packing.pack_weights import PackWeights
from rdoq_onnx.passes.packing.shorten_names import ShortenNames
from rdoq_onnx.system.runtime import Runtime

LEVELS = ("none", "basic", "all")
RUNTIME = Runtime("cpu", 1)


def model_of(graph, tensors):
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 13]> {graph}')
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in tensors.items())
    return model


def half_exact(rng, size, low=0.005, high=0.02):
    return rng.uniform(low, high, size).astype(np.float16).astype(np.float32)


def biases(rng, scales, step):
    """Integers of biases that half precision holds."""
    half = rng.normal(0, 0.5, len(scales)).astype(np.float16).astype(np.float32)
    return np.rint(half / (scales * step)).astype(np.int32)


def network():
    """Two convolutions and a Gemm as InsertQDQ leaves them; names of what was added; feeds."""
    rng = np.random.default_rng(3)
    q = "{0}_q = QuantizeLinear ({0}, {1}_s, {1}_z) {0}_d = DequantizeLinear ({0}_q, {1}_s, {1}_z)"
    layers, tensors = [], {}
    for k, (shape, axis) in enumerate([((80, 3, 3, 3), 0), ((80, 80, 3, 3), 0), ((80, 10), 1)]):
        scales = half_exact(rng, shape[axis])
        step = np.array(0.02 + 0.01 * k, np.float32)
        tensors |= {
            f"w{k}": rng.integers(-8, 8, shape).astype(np.int8),
            f"w{k}_s": scales,
            f"b{k}": biases(rng, scales, step),
            f"w{k}_z": np.zeros(shape[axis], np.int8),
            f"a{k}_s": step,
            f"a{k}_z": np.array(128, np.uint8),
        }
        layers.append(f"""w{k}_d = DequantizeLinear <axis = {axis}> (w{k}, w{k}_s, w{k}_z)
            b{k}_s = Mul (w{k}_s, a{k}_s) b{k}_d = DequantizeLinear <axis = 0> (b{k}, b{k}_s)""")
    graph = f"""g (float[2, 3, 6, 6] x) => (float[2, 10] y)
        {{ {" ".join(layers)} {q.format("x", "a0")}
          t = Conv (x_d, w0_d, b0_d) {q.format("t", "a1")} u = Conv (t_d, w1_d, b1_d)
          p = GlobalAveragePool (u) f = Flatten (p) {q.format("f", "a2")} v = Gemm (f_d, w2_d, b2_d)
          v_q = QuantizeLinear (v, a2_s, a2_z) y = DequantizeLinear (v_q, a2_s, a2_z) }}"""
    return model_of(graph, tensors), frozenset(tensors), {"x": rng.standard_normal((2, 3, 6, 6)).astype(np.float32)}


def same_numbers(ort_run, model, packed, feeds):
    checker.check_model(packed, full_check=True)
    for level in LEVELS:
        for got, expected in zip(ort_run(packed, feeds, level), ort_run(model, feeds, level), strict=True):
            np.testing.assert_array_equal(got, expected)


def kinds(model):
    return {t.name: t.data_type for t in model.graph.initializer}


def ops(model):
    return sorted(n.op_type for n in model.graph.node)


def half_of(model):
    """Lengths of what is stored in half precision."""
    return sorted(t.dims[0] for t in model.graph.initializer if t.data_type == TensorProto.FLOAT16)


def test_network_computes_the_same_with_the_same_kernels(ort_run):
    model, added, feeds = network()
    packed = run_passes([PackVectors(added)], model)
    same_numbers(ort_run, model, packed, feeds)
    assert half_of(packed) == [170, 170]
    assert TensorProto.INT32 not in kinds(packed).values()
    optimized = RUNTIME.optimized(packed, "all")
    assert ops(optimized) == ops(RUNTIME.optimized(model, "all"))
    assert {"QLinearConv", "QGemm"} <= set(ops(optimized))
    tensors = {t.name: numpy_helper.to_array(t) for t in optimized.graph.initializer}
    conv = next(n for n in optimized.graph.node if n.op_type == "QLinearConv")
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    assert tensors[conv.input[8]].dtype == np.int32
    np.testing.assert_array_equal(tensors[conv.input[8]], stored["b0"])
    np.testing.assert_array_equal(tensors[conv.input[4]], stored["w0_s"])


def test_together_with_packed_weights(ort_run):
    model, added, feeds = network()
    packed = run_passes([PackWeights(["w0", "w1", "w2"]), PackVectors(added), ShortenNames([])], model)
    same_numbers(ort_run, model, packed, feeds)
    assert ops(RUNTIME.optimized(packed, "all")) == ops(RUNTIME.optimized(model, "all"))
    assert packed.ByteSize() < 0.57 * model.ByteSize()


def test_only_what_was_added_is_touched():
    model, added, _ = network()
    assert run_passes([PackVectors(frozenset())], model) == model
    packed = run_passes([PackVectors(added - {"w0_s", "b1", "w1_z"})], model)
    assert {"w0_s", "b1", "w1_z"} <= kinds(packed).keys()
    assert half_of(packed) == [90, 90]


def test_equal_tensors_are_stored_once_and_long_zeros_made(ort_run):
    model, added, feeds = network()
    packed = run_passes([PackVectors(added)], model)
    zeros = [tuple(t.dims) for t in packed.graph.initializer if t.data_type == TensorProto.INT8 and len(t.dims) < 2]
    # Of 80, 80 and 10 channels: what is expanded, and the short one.
    assert sorted(zeros) == [(), (10,)]
    assert ops(packed).count("Expand") == 1
    assert sum(t.data_type == TensorProto.UINT8 for t in packed.graph.initializer) == 1
    same_numbers(ort_run, model, packed, feeds)


def scaled(scales):
    """A model that gives a weight at each of `scales`, which are of any shape that broadcasts to [4, 3]."""
    names = list(scales)
    lines = " ".join(f"{n}_y = Mul (w, {n})" for n in names)
    outputs = ", ".join(f"float[4, 3] {n}_y" for n in names)
    return model_of(f"g () => ({outputs}) {{ {lines} }}", {"w": np.ones((4, 3), np.float32), **scales})


@pytest.mark.parametrize("value", [2.0**-15 * 1.0009765625, 65536.0, 1.00049, 1e-9, np.inf])
def test_scales_that_half_precision_lacks_stay(ort_run, value):
    exact = np.array([[0.5], [1.0009765625], [2.0**-14], [65504.0]], np.float32)
    other = exact.copy()
    other[2] = value
    model = scaled({"exact": exact, "other": other})
    packed = run_passes([PackVectors(["exact", "other"])], model)
    held = bool(np.float32(np.float16(np.clip(value, -65504, 65504))) == np.float32(value)) or np.isinf(value)
    assert half_of(packed) == ([8] if held else [4])
    assert ("other" in kinds(packed)) != held
    same_numbers(ort_run, model, packed, {})


def test_scalars_stay():
    model = scaled({"s": np.array(0.5, np.float32), "one": np.array([0.25], np.float32)})
    assert run_passes([PackVectors(["s", "one"])], model) == model


def biased(q, scales, step, readers=1):
    """A model that gives the INT32 bias and what its DequantizeLinear makes of it."""
    n = len(q)
    lines = " ".join(f"s{k} = Mul (ws, a{k}) y{k} = DequantizeLinear <axis = 0> (q, s{k})" for k in range(readers))
    outputs = ", ".join([f"int32[{n}] t", *(f"float[{n}] y{k}" for k in range(readers))])
    tensors = {"q": q, "ws": scales} | {f"a{k}": np.array(step * (k + 1), np.float32) for k in range(readers)}
    return model_of(f"g () => ({outputs}) {{ t = Identity (q) {lines} }}", tensors)


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(2, 20),
    magnitude=st.floats(-4, 4),
    step=st.floats(-5, 0),
    seed=st.integers(0, 2**32 - 1),
    made=st.booleans(),
)
def test_biases_come_back_bit_for_bit(ort_run, size, magnitude, step, seed, made):
    """Those of half-precision biases, nearly always halved, and others, which need not be."""
    rng = np.random.default_rng(seed)
    scales = half_exact(rng, size)
    if made:
        half = (10**magnitude * rng.standard_normal(size)).astype(np.float16).astype(np.float32)
        q = np.clip(np.rint(half / (scales * np.float32(10**step))), -(2**31) + 128, 2**31 - 129).astype(np.int32)
    else:
        q = rng.integers(-(2**31), 2**31, size, dtype=np.int64).astype(np.int32)
    model = biased(q, scales, 10**step)
    packed = run_passes([PackVectors(["q"])], model)
    same_numbers(ort_run, model, packed, {})
    for level in ("none", "all"):
        np.testing.assert_array_equal(ort_run(packed, {}, level)[0], q)


def test_bias_that_half_precision_lacks_stays():
    scales = np.array([0.5, 0.25], np.float32)
    for q, halved in ([3, -7], True), ([2**20 + 1, 5], False), ([2**30, 5], False):
        packed = run_passes([PackVectors(["q"])], biased(np.array(q, np.int32), scales, 0.125))
        assert ("q" not in kinds(packed)) == halved


def test_bias_with_two_steps_stays():
    q = np.array([3, -7], np.int32)
    packed = run_passes([PackVectors(["q"])], biased(q, np.array([0.5, 0.25], np.float32), 0.125, readers=2))
    assert kinds(packed)["q"] == TensorProto.INT32

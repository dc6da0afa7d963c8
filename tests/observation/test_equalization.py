"""Equalization: the network's function is unchanged, channel ranges are evened out, fixed channels are left alone."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

import rdoq_onnx
from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.network import Network
from rdoq_onnx.analysis.normalization import NORMALIZE
from rdoq_onnx.calibration.load import load_samples
from rdoq_onnx.calibration.samples import Samples, input_specs
from rdoq_onnx.config import Config
from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.observation import equalization
from rdoq_onnx.observation.channel_slots import find_chains
from rdoq_onnx.observation.equalization import channel_ranges, equalize, exponent_for
from rdoq_onnx.passes import run_passes
from rdoq_onnx.system import io
from rdoq_onnx.system.runtime import Runtime
from tests.conftest import ROOT, deviation

RUNTIME = Runtime("cpu", 2)
NARROW, WIDE = Config(activation_bits=4), Config(activation_bits=8)
COUNT = 6


@dataclass
class Net:
    """A normalized model with samples, before and after."""

    network: Network
    samples: Samples
    config: Config

    @property
    def feeds(self):
        return dict(self.samples.arrays)

    @property
    def model(self):
        return self.network.model

    def equalized(self):
        return equalize(self.network, self.config, self.samples, RUNTIME)

    def chains(self):
        ranges = channel_ranges(self.network, self.samples, RUNTIME)
        return find_chains(self.network, {name: r.shape for name, r in ranges.items()})


def net(text, weights, config=NARROW, sample=(3, 8, 8)):
    """weights: shapes, or values. Channels of weights get ranges that differ by a factor of up to 30."""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    rng = np.random.default_rng(0)
    for name, value in weights.items():
        if isinstance(value, tuple):
            value = rng.standard_normal(value, np.float32)
            value *= np.geomspace(0.1, 3, len(value)).reshape(-1, *[1] * (value.ndim - 1)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    network = analyse(run_passes(NORMALIZE, model), config.selection)
    return Net(network, Samples("test", {"x": rng.standard_normal((COUNT, *sample), np.float32)}), config)


def operators(model):
    return Counter(n.op_type for n in model.graph.node)


def unchanged_outputs(ort_run, before, after, feeds, most=1e-5):
    return deviation(ort_run(after, feeds, "none"), ort_run(before, feeds, "none")) < most


def peaks(model, tensor, samples, ort_run):
    """Largest magnitude of each channel of `tensor` in a sample, mean over the samples."""
    (value,) = ort_run(with_outputs(model, [tensor]), dict(samples.arrays), "none")
    return np.abs(value).max(axis=tuple(range(2, value.ndim))).mean(axis=0, dtype=np.float64)


def weight(model, name):
    """The weight of the layer that gives `name`."""
    node = next(n for n in model.graph.node if n.output[0] == name)
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == node.input[1]))


ZERO, SIX = np.float32(0), np.float32(6)
INTS = {name: np.array(v) for name, v in {"one": [1, 1], "two": [2, 2], "far": [99, 99], "high_low": [2, 3]}.items()}

MOBILE = """g (float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] y)
    { z1 = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) a1 = Relu (z1)
      z2 = Conv <pads = [1, 1, 1, 1], group = 8> (a1, w2, b2) a2 = Clip (z2, zero, six)
      z3 = Conv (a2, w3, b3) a3 = Clip (z3, zero, six)
      z4 = Conv <pads = [1, 1, 1, 1], group = 6> (a3, w4, b4) a4 = Clip (z4, zero, six) y = Conv (a4, w5) }"""
MOBILE_WEIGHTS = {
    "w1": (8, 3, 3, 3),
    "b1": (8,),
    "w2": (8, 1, 3, 3),
    "b2": (8,),
    "w3": (6, 8, 1, 1),
    "b3": (6,),
    "w4": (6, 1, 3, 3),
    "b4": (6,),
    "w5": (4, 6, 1, 1),
    "zero": ZERO,
    "six": SIX,
}
STREAM = """g (float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] y)
    { z1 = Conv (x, w1, b1) a1 = Relu (z1)
      z2 = Conv (a1, w2) a2 = Relu (z2) z3 = Conv (a2, w3) s1 = Add (a1, z3)
      z4 = Conv (s1, w4) a4 = LeakyRelu (z4) z5 = Conv (a4, w5) s2 = Add (z5, s1) y = Conv (s2, w6) }"""
STREAM_WEIGHTS = {
    "w1": (6, 3, 1, 1),
    "b1": (6,),
    "w2": (5, 6, 1, 1),
    "w3": (6, 5, 1, 1),
    "w4": (5, 6, 1, 1),
    "w5": (6, 5, 1, 1),
    "w6": (4, 6, 1, 1),
}
OPTION_A = """g (float[N, 3, 8, 8] x) => (float[N, 4, 4, 4] y)
    { z1 = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) a1 = Relu (z1)
      z2 = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (a1, w2, b2) a2 = Relu (z2)
      z3 = Conv (a2, w3) half = Slice (a1, one, far, high_low, two) short = Pad (half, pads)
      s = Add (z3, short) a3 = Relu (s) y = Conv (a3, w4) }"""
OPTION_A_WEIGHTS = {
    "w1": (4, 3, 3, 3),
    "b1": (4,),
    "w2": (8, 4, 3, 3),
    "b2": (8,),
    "w3": (8, 8, 1, 1),
    "w4": (4, 8, 1, 1),
    "pads": np.array([0, 1, 0, 0, 0, 3, 0, 0]),
    **INTS,
}
CONCAT = """g (float[N, 3, 8, 8] x) => (float[N, 4, 4, 4] y)
    { z1 = Conv (x, w1) a1 = Relu (z1) z2 = Conv (a1, w2) z3 = Conv <pads = [1, 1, 1, 1]> (a1, w3)
      a2 = Relu (z2) a3 = Relu (z3) c = Concat <axis = 1> (a2, a1, a3)
      p = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (c) y = Conv (p, w4) }"""
CONCAT_WEIGHTS = {"w1": (4, 3, 1, 1), "w2": (3, 4, 1, 1), "w3": (5, 4, 3, 3), "w4": (4, 12, 1, 1)}
HEAD = """g (float[N, 3, 8, 8] x) => (float[N, 4] y)
    { z1 = Conv <group = 3> (x, w1, b1) a1 = Relu (z1) m = MaxPool <kernel_shape = [3, 3]> (a1)
      z2 = Conv <group = 2> (m, w2) g = GlobalAveragePool (z2) f = Flatten (g)
      z3 = Gemm <alpha = 0.5, beta = 2.0> (f, w3, b3) a3 = Relu (z3) y = Gemm <transB = 1> (a3, w4, b4) }"""
HEAD_WEIGHTS = {
    "w1": (6, 1, 3, 3),
    "b1": (6,),
    "w2": (8, 3, 1, 1),
    "w3": (8, 5),
    "b3": (1, 5),
    "w4": (4, 5),
    "b4": (4,),
}
DENSE_CLIP = """g (float[N, 6] x) => (float[N, 4] y)
    { z1 = Gemm (x, w1, b1) a1 = Clip (z1, zero, six) z2 = Gemm <transB = 1> (a1, w2, b2) a2 = Relu (z2)
      y = Gemm (a2, w3) }"""
DENSE_CLIP_WEIGHTS = {
    "w1": (6, 8),
    "b1": np.float32(0.3),
    "w2": (5, 8),
    "b2": (5,),
    "w3": (5, 4),
    "zero": ZERO,
    "six": SIX,
}
MEAN = """g (float[N, 3, 8, 8] x) => (float[N, 4] y)
    { z1 = Conv (x, w1, b1) a1 = Relu (z1) m = ReduceMean <axes = [2, 3], keepdims = 0> (a1) y = Gemm (m, w2) }"""
NETS = {
    "mobile": (MOBILE, MOBILE_WEIGHTS),
    "residual stream": (STREAM, STREAM_WEIGHTS),
    "pad and slice": (OPTION_A, OPTION_A_WEIGHTS),
    "concat": (CONCAT, CONCAT_WEIGHTS),
    "head": (HEAD, HEAD_WEIGHTS),
    "clip between dense layers": (DENSE_CLIP, DENSE_CLIP_WEIGHTS),
    "mean": (MEAN, {"w1": (6, 3, 1, 1), "b1": (6,), "w2": (6, 4)}),
}


def case(name, config=NARROW):
    return net(*NETS[name], config, (6,) if "float[N, 6] x" in NETS[name][0] else (3, 8, 8))


@pytest.mark.parametrize("exponent", [0.35, 1.0])
@pytest.mark.parametrize("name", NETS)
def test_the_network_computes_the_same(monkeypatch, ort_run, name, exponent):
    monkeypatch.setattr(equalization, "exponent_for", lambda config: exponent)
    it = case(name)
    before = it.model.SerializeToString(deterministic=True)
    after = it.equalized()
    assert it.model.SerializeToString(deterministic=True) == before
    assert after.model != it.model
    onnx.checker.check_model(after.model, full_check=True)
    assert unchanged_outputs(ort_run, it.model, after.model, it.feeds)
    # Also on other samples, with values above the ceilings.
    other = {"x": 5 * np.random.default_rng(9).standard_normal(it.feeds["x"].shape, np.float32)}
    assert unchanged_outputs(ort_run, it.model, after.model, other)
    assert [x.name for x in after.layers] == [x.name for x in it.network.layers]


def spreads(it, model):
    """The widest range of each slot, in the tensors that will be quantized."""
    chains = it.chains()
    quantized = {t for a in it.network.activations for t in (a.tensor, *a.parts)}
    found = {}
    for tensor, slots in ((t, s) for t, s in chains.slots.items() if t in quantized):
        for slot, value in zip(slots.tolist(), peaks(model, tensor, it.samples, ort_values), strict=True):
            found[slot] = max(found.get(slot, 0.0), float(value))
    return found


def ort_values(model, feeds, level):
    return RUNTIME.session(model, level).run(feeds)


# Tensors of free channels, and whether all of their consumers are depthwise convolutions.
FREE = {
    "mobile": {"a1": True, "a2": False, "a3": True, "a4": False},
    "residual stream": {"s2": False, "a2": False, "a4": False},
    "pad and slice": {"a1": False, "a2": False, "a3": False},
    "concat": {"a1": False, "a2": False, "a3": False, "p": False},
    "head": {"m": False, "f": False, "a3": False},
    "clip between dense layers": {"a1": False, "a2": False},
    "mean": {"m": False},
}


@pytest.mark.parametrize("config", [NARROW, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("name", NETS)
def test_ranges_of_channels_come_closer(name, config):
    """A range R becomes R^(1-e)·top^e. In front of depthwise convolutions only, e is 1 for any activation width, since
    both sides have one scale per channel.
    """
    it = case(name, config)
    chains, after = it.chains(), it.equalized()
    old, new = spreads(it, it.model), spreads(it, after.model)
    top = {}
    for slot, value in old.items():
        top[chains.component[slot]] = max(value, top.get(chains.component[slot], 0))
    free = {}
    for tensor, depthwise in FREE[name].items():
        free |= dict.fromkeys(chains.slots[tensor].tolist(), 1.0 if depthwise else exponent_for(config))
    free = {slot: power for slot, power in free.items() if slot in old}
    assert free.keys() == set(old) - chains.fixed
    for slot, value in old.items():
        widest = top[chains.component[slot]]
        quiet = value <= equalization._QUIET * widest
        factor = 1.0 if quiet else min((widest / value) ** free.get(slot, 0.0), equalization._MAX_FACTOR)
        assert new[slot] == pytest.approx(value * factor, rel=1e-4)
    if config is NARROW:
        assert any(new[slot] > 1.2 * old[slot] for slot in free)


def test_ranges_are_means_over_samples_of_peaks(ort_run):
    it = case("mobile")
    found = channel_ranges(it.network, it.samples, RUNTIME)
    assert set(found) == {"z1", "a1", "z2", "a2", "z3", "a3", "z4", "a4", "y"}
    (value,) = ort_run(with_outputs(it.model, ["z3"]), it.feeds, "none")
    np.testing.assert_allclose(found["z3"].ravel(), np.abs(value).max(axis=(2, 3)).mean(axis=0), rtol=1e-5)
    assert found["z3"].shape == (6, 1, 1)


def test_wide_activations_are_not_equalized_at_the_weights_expense(ort_run):
    it = case("mobile", WIDE)
    assert exponent_for(WIDE) == exponent_for(Config(activation_bits=6)) == 0
    assert exponent_for(NARROW) > 0
    after = it.equalized()
    for tensor in ("a2", "a4"):
        old, new = (peaks(m, tensor, it.samples, ort_run) for m in (it.model, after.model))
        np.testing.assert_allclose(new, old, rtol=1e-4)
    assert operators(after.model)["Clip"] == 2
    assert operators(after.model)["Min"] == 1


def test_each_channel_has_a_ceiling_of_its_own(ort_run):
    it = case("mobile")
    after = it.equalized()
    assert operators(it.model)["Clip"] == 3
    assert operators(after.model)["Clip"] == 0
    assert operators(after.model)["Min"] == 3
    tensors = {t.name: numpy_helper.to_array(t) for t in after.model.graph.initializer}
    factors = {}
    for node in after.model.graph.node:
        if node.op_type == "Min":
            ceiling = tensors[node.input[1]]
            assert ceiling.shape == (1, {"a2": 8, "a3": 6, "a4": 6}[node.output[0]], 1, 1)
            factors[node.output[0]] = ceiling.ravel() / 6
    assert all(len(np.unique(f)) > 1 for f in factors.values())
    # A row is scaled up by the factor that its consumer's column is scaled down by.
    for layer, consumer, factor in (("z2", "z3", factors["a2"]), ("z4", "y", factors["a4"])):
        rows = weight(after.model, layer) / weight(it.model, layer)
        np.testing.assert_allclose(rows[:, 0, 0, 0] * input_factors(it, after, layer), factor, rtol=1e-4)
        columns = weight(after.model, consumer) / weight(it.model, consumer)
        outputs = output_factors(it, after, consumer)
        expected = np.tile(1 / factor, (len(columns), 1))
        np.testing.assert_allclose(columns[:, :, 0, 0] / outputs[:, None], expected, rtol=1e-4)


def input_factors(it, after, layer):
    """Return the factors of the input channels of a depthwise `layer`."""
    source = {"z2": "a1", "z4": "a3"}[layer]
    return peaks_ratio(it, after, source)


def output_factors(it, after, layer):
    return {"z3": lambda: peaks_ratio(it, after, "z3"), "y": lambda: np.ones(4)}[layer]()


def peaks_ratio(it, after, tensor):
    """Return the factor of each channel of `tensor`, from its values."""
    feeds = {k: v[:2] for k, v in it.feeds.items()}
    old, new = (RUNTIME.session(with_outputs(m, [tensor]), "none").run(feeds)[0] for m in (it.model, after.model))
    return np.abs(new).max(axis=(0, 2, 3)) / np.abs(old).max(axis=(0, 2, 3))


SHORT = "u = Tanh (z1)"
FIXED = {
    "graph output": ("z1 = Conv (x, w1) a = Relu (z1) y = Conv (a, w2)", "float[N, 6, 8, 8] a", {}),
    "graph output before": ("z1 = Conv (x, w1) a = Relu (z1) y = Conv (a, w2)", "float[N, 6, 8, 8] z1", {}),
    "graph input": ("a = Relu (x) y = Conv (a, w2)", "", {"w2": (4, 3, 1, 1)}),
    "sigmoid": ("z1 = Conv (x, w1) a = Sigmoid (z1) y = Conv (a, w2)", "", {}),
    "hard swish": ("z1 = Conv (x, w1) a = HardSwish (z1) y = Conv (a, w2)", "", {}),
    "tanh beside": ("z1 = Conv (x, w1) a = Relu (z1) y = Conv (a, w2) t = Tanh (a)", "float[N, 6, 8, 8] t", {}),
    "softmax over channels": ("z1 = Conv (x, w1) a = Softmax <axis = 1> (z1) y = Conv (a, w2)", "", {}),
    "clip off zero": (
        "z1 = Conv (x, w1) a = Clip (z1, low, high) y = Conv (a, w2)",
        "",
        {"low": np.float32(-1), "high": np.float32(1)},
    ),
    "clip with a computed bound": (
        "z1 = Conv (x, w1) m = ReduceMax <keepdims = 0> (x) a = Clip (z1, low, m) y = Conv (a, w2)",
        "",
        {"low": np.float32(0)},
    ),
    "add of a constant": ("z1 = Conv (x, w1) r = Relu (z1) a = Add (r, c) y = Conv (a, w2)", "", {"c": (1, 6, 1, 1)}),
    "add of the input": (
        "z1 = Conv (x, w1) a = Add (z1, x) y = Conv (a, w2)",
        "",
        {"w1": (3, 3, 1, 1), "w2": (4, 3, 1, 1)},
    ),
    "add of another rank": (
        "z1 = Conv (x, w1) p = GlobalAveragePool (x) f = Flatten (p) g = Gemm (f, w3) a = Add (z1, g) y = Conv (a, w2)",
        "",
        {"w1": (8, 3, 1, 1), "w3": (3, 8), "w2": (4, 8, 1, 1)},
    ),
    "pad with another value": (
        "z1 = Conv (x, w1) a = Pad (z1, pads, v) y = Conv (a, w2)",
        "",
        {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "v": np.float32(0.7)},
    ),
    "slice of channels": (
        "z1 = Conv (x, w1) a = Slice (z1, from, to, axis) y = Conv (a, w2)",
        "",
        {"from": np.array([0]), "to": np.array([5]), "axis": np.array([1]), "w2": (4, 5, 1, 1)},
    ),
    "concat with the input": (
        "z1 = Conv (x, w1) c = Concat <axis = 2> (z1, x) y = Conv (c, w2)",
        "",
        {"w1": (3, 3, 1, 1), "w2": (4, 3, 1, 1)},
    ),
    "channels moved": (
        "z1 = Conv (x, w1) a = Transpose <perm = [0, 2, 1, 3]> (z1) y = Conv (a, w2)",
        "",
        {"w1": (8, 3, 1, 1), "w2": (4, 8, 1, 1)},
    ),
    "channels spread over others by a reshape": (
        "z1 = Conv (x, w1) g = Reshape (z1, shape) y = Gemm (g, w2) ",
        "rank 2",
        {"w1": (8, 3, 1, 1), "w2": (8, 5), "shape": np.array([-1, 8])},
    ),
    "size of the tensor": (
        "z1 = Conv (x, w1) a = Relu (z1) m = ReduceMean (a) b = Mul (a, m) y = Conv (b, w2)",
        "",
        {},
    ),
    "weight on two layers": (
        "z1 = Conv (x, w1) a = Relu (z1) z2 = Conv (a, w2) b = Relu (z2) y = Conv (b, w2)",
        "",
        {"w2": (6, 6, 1, 1)},
    ),
    "bias on two layers": (
        "z1 = Conv (x, w1, b1) a = Relu (z1) y = Conv (a, w2, b1)",
        "",
        {"w2": (6, 6, 1, 1), "b1": (6,)},
    ),
    "computed bias": (
        "z1 = Conv (x, w1, c) a = Relu (z1) y = Conv (a, w2) m = ReduceMean (x) n = Reshape (m, shape) "
        "c = Expand (n, size)",
        "",
        {"shape": np.array([1]), "size": np.array([6])},
    ),
    "subgraph": (
        "z1 = Conv (x, w1) a = Relu (z1) m = ReduceMean <keepdims = 0> (x) yes = Greater (m, low) "
        "t = If (yes) <then_branch = g1 () => (float[N, 6, 8, 8] t1) { t1 = Exp (a) }, "
        "else_branch = g2 () => (float[N, 6, 8, 8] t2) { t2 = Neg (a) }> y = Conv (a, w2)",
        "float[N, 6, 8, 8] t",
        {"low": np.float32(-9)},
    ),
    "transposed convolution": (
        "z1 = ConvTranspose (x, w1) a = Relu (z1) y = ConvTranspose (a, w2)",
        "",
        {"w1": (3, 6, 1, 1), "w2": (6, 4, 1, 1)},
    ),
    "indices of the maximum": (
        "z1 = Conv (x, w1) a, i = MaxPool <kernel_shape = [2, 2]> (z1) y = Conv (a, w2) ",
        "int64[N, 6, 7, 7] i",
        {},
    ),
}


@pytest.mark.parametrize("kind", FIXED)
def test_what_must_not_change_does_not(ort_run, kind):
    """With the exponent of narrow activations; no channel here is free, so the network itself is returned."""
    nodes, output, weights = FIXED[kind]
    outputs = "float[A, B] y" if output == "rank 2" else "float[A, B, C, D] y" + (f", {output}" if output else "")
    if "m = ReduceMean (x)" in nodes:
        # Keep the nodes in an order of execution.
        body, late = nodes.split(" m = ReduceMean")
        nodes = f"m = ReduceMean{late} {body}"
    weights = {"w1": (6, 3, 1, 1), "w2": (4, 6, 1, 1), **weights}
    it = net(f"g (float[N, 3, 8, 8] x) => ({outputs}) {{ {nodes} }}", weights)
    after = it.equalized()
    assert unchanged_outputs(ort_run, it.model, after.model, {"x": it.feeds["x"][:1]})
    assert after is it.network


def test_float_activations_have_nothing_to_even_out():
    it = net(MOBILE, MOBILE_WEIGHTS, Config(activation_bits=None))
    assert it.equalized() is it.network


def test_an_excluded_layer_is_left_alone():
    it = net(MEAN, {"w1": (6, 3, 1, 1), "b1": (6,), "w2": (6, 4)}, Config(activation_bits=4, exclude=("w2",)))
    assert it.equalized() is it.network


def test_channels_of_a_pad_and_of_a_concat_share_slots_one_to_one():
    chains = case("pad and slice").chains()
    half, short, third = (chains.slots[n].tolist() for n in ("half", "short", "a3"))
    assert short == third
    assert short[1:5] == half == chains.slots["z1"].tolist()
    assert not set(short[:1] + short[5:]) & set(half)
    joined = case("concat").chains()
    parts = [joined.slots[n].tolist() for n in ("z2", "z1", "z3")]
    assert [*parts[0], *parts[1], *parts[2]] == joined.slots["p"].tolist()
    assert len(set(joined.slots["p"].tolist())) == 12


def test_an_add_unites_the_whole_stream():
    chains = case("residual stream").chains()
    stream = chains.slots["s2"].tolist()
    assert all(chains.slots[n].tolist() == stream for n in ("a1", "z3", "s1", "z5"))
    free = set(stream) | set(chains.slots["a2"].tolist()) | set(chains.slots["a4"].tolist())
    assert not free & chains.fixed
    assert set(chains.slots["y"].tolist()) <= chains.fixed
    assert len({chains.component[s] for s in stream}) == 1


def test_dead_and_nearly_dead_channels_are_left_alone(ort_run):
    it = case("head")
    first = next(t for t in it.model.graph.initializer if t.name == "w1")
    value, bias = numpy_helper.to_array(first).copy(), next(t for t in it.model.graph.initializer if t.name == "b1")
    value[0], value[1] = 0, 1e-6
    first.CopyFrom(numpy_helper.from_array(value, "w1"))
    bias.CopyFrom(numpy_helper.from_array(np.zeros(6, np.float32), "b1"))
    after = it.equalized()
    assert unchanged_outputs(ort_run, it.model, after.model, it.feeds)
    np.testing.assert_array_equal(weight(after.model, "z1")[:2], value[:2])
    assert not np.array_equal(weight(after.model, "z1")[2], value[2])


def test_no_channel_is_raised_beyond_the_limit(monkeypatch, ort_run):
    monkeypatch.setattr(equalization, "_MAX_FACTOR", 2.0)
    it = case("mobile")
    after = it.equalized()
    ratio = peaks_ratio(it, after, "a1")
    assert ratio.max() == pytest.approx(2, rel=1e-5)
    assert ratio.min() == pytest.approx(1, rel=1e-5)
    assert unchanged_outputs(ort_run, it.model, after.model, it.feeds)


def test_a_fixed_batch(ort_run):
    it = net(MOBILE.replace("[N,", "[2,"), MOBILE_WEIGHTS)
    samples = load_samples(it.feeds, input_specs(it.model), None)
    assert samples.batch == 2
    after = equalize(it.network, it.config, samples, RUNTIME)
    assert after is not it.network
    assert unchanged_outputs(ort_run, it.model, after.model, {"x": it.feeds["x"][:2]})


def test_digits(ort_run):
    model = run_passes(NORMALIZE, io.read_model(ROOT / "models" / "digits_cnn.onnx"))
    samples = load_samples(ROOT / "models" / "digits_calib.npz", input_specs(model), 8)
    expect_real(ort_run, model, samples)


@pytest.mark.parametrize(
    ("name", "calibration"),
    [("cifar10/resnet20.onnx", "cifar10/calib.npz"), ("imagenet/mobilenet_v2.onnx", "imagenet")],
)
def test_zoo(ort_run, zoo, name, calibration):
    model = run_passes(NORMALIZE, io.read_model(zoo / name))
    if calibration.endswith(".npz"):
        samples = load_samples(zoo / calibration, input_specs(model), 4)
    else:
        (spec,) = input_specs(model)
        shape = [2, *(d or 224 for d in spec.shape[1:])]
        smooth = np.random.default_rng(0).standard_normal((*shape[:2], 28, 28)).astype(np.float32)
        samples = Samples("random", {spec.name: smooth.repeat(8, 2).repeat(8, 3)}, batch=spec.shape[0])
    expect_real(ort_run, model, samples)


def expect_real(ort_run, model, samples):
    """At 4 bits the network changes, and computes the same."""
    network = analyse(model, NARROW.selection)
    after = equalize(network, NARROW, samples, RUNTIME)
    assert after is not network
    feeds = next(samples.batches(2))
    assert unchanged_outputs(ort_run, model, after.model, feeds, 5e-5)


@pytest.fixture(scope="module")
def quantized():
    """The MobileNet-like network, its weights in 8 bits and its activations in 4."""
    it = case("mobile")
    return it, rdoq_onnx.quantize(it.model, it.feeds, bits=8, activation_bits=4, threads=2, storage="int8")


def test_ceilings_become_a_min_of_integers(quantized):
    """Only ceilings that the quantizer's own saturation does not imply remain."""
    _, result = quantized
    producers = {o: n.op_type for n in result.model.graph.node for o in n.output}
    tensors = {t.name: numpy_helper.to_array(t) for t in result.model.graph.initializer}
    mins = [n for n in result.model.graph.node if n.op_type == "Min"]
    assert mins
    for node in mins:
        (ceiling,) = (tensors[i] for i in node.input if i in tensors)
        assert ceiling.dtype == np.uint8
        assert ceiling.shape in ((1, 8, 1, 1), (1, 6, 1, 1))
        assert len(np.unique(ceiling)) > 1
        assert producers[node.input[0]] in ("QuantizeLinear", "Clip")
    assert not {"Relu", "Clip"} & {n.op_type for n in result.model.graph.node if producers.get(n.input[0]) == "Conv"}


def test_the_quantized_network_fuses(quantized):
    _, result = quantized
    kernels = operators(RUNTIME.optimized(result.model, "all"))
    # The last convolution produces the graph output, which is not quantized.
    assert kernels["QLinearConv"] == 4
    assert kernels["Conv"] + kernels["FusedConv"] == 1
    assert kernels["Min"] == operators(result.model)["Min"]
    # Only the input is quantized, and only the inputs of the last convolution are dequantized.
    assert kernels["QuantizeLinear"] == 1
    assert kernels["DequantizeLinear"] <= 2
    assert not kernels["Relu"]


def test_levels_agree_up_to_ties(ort_run, quantized):
    it, result = quantized
    (basic,), (default,) = (ort_run(result.model, it.feeds, level) for level in ("basic", "all"))
    span = np.abs(basic).max()
    # Most values agree; a tie rounded the other way moves a few by one step of a 4-bit activation.
    assert np.mean(np.abs(basic - default) < 1e-5 * span) > 0.9
    assert deviation([default], [basic]) < 0.05


PRELU = """g (float[N, 3, 8, 8] x) => (float[N, 4, 6, 6] y)
    { z1 = Conv (x, w1, b1) a1 = PRelu (z1, slope) z2 = Conv <group = 8> (a1, w2) y = Conv (z2, w3) }"""
PRELU_WEIGHTS = {
    "w1": (8, 3, 1, 1),
    "b1": (8,),
    "w2": (8, 1, 3, 3),
    "w3": (4, 8, 1, 1),
    "slope": np.linspace(0.05, 0.6, 8, dtype=np.float32).reshape(8, 1, 1),
}


def test_through_prelu(ort_run):
    before = net(PRELU, PRELU_WEIGHTS)
    after = before.equalized()
    assert unchanged_outputs(ort_run, before.model, after.model, before.feeds)
    # Both sides of the PRelu are quantized, and share their channels' scales.
    found = np.maximum(*(peaks(after.model, name, before.samples, ort_run) for name in ("z1", "a1")))
    assert found.max() < 1.01 * found.min()


def test_a_prelu_whose_slope_is_computed_ends_the_chain():
    text = PRELU.replace("a1 = PRelu (z1, slope)", "s = Abs (z1) a1 = PRelu (z1, s)")
    weights = {k: v for k, v in PRELU_WEIGHTS.items() if k != "slope"}
    chains = net(text, weights).chains()
    assert set(chains.slots["a1"].tolist()) <= chains.fixed


def test_layers_keep_their_weights_names():
    before = net(PRELU, PRELU_WEIGHTS)
    assert [layer.weight for layer in before.equalized().layers] == [layer.weight for layer in before.network.layers]


@pytest.mark.parametrize("on_grid", [False, True])
def test_the_columns_of_a_weight_on_a_grid_keep_their_scale(on_grid):
    rng = np.random.default_rng(0)
    consumer = rng.integers(-7, 8, (5, 4, 3, 3)) if on_grid else rng.standard_normal((5, 4, 3, 3))
    weights = {"w": (4, 3, 3, 3), "v": consumer.astype(np.float32) / 8}
    text = "g (float[N, 3, 8, 8] x) => (float[N, 5, 4, 4] y) { z = Conv (x, w) r = Relu (z) y = Conv (r, v) }"
    it = net(text, weights)
    after = it.equalized()
    before, now = (_initializer(model, "v") for model in (it.model, after.model))
    assert np.array_equal(before, now) == on_grid


def _initializer(model, name):
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def test_a_tensor_whose_channel_axis_varies_has_no_ranges():
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, T, 3] x) => (float[N, T, 2] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}>
    { a = Relu (x) y = MatMul (a, w) }""")
    network = analyse(run_passes(NORMALIZE, model), WIDE.selection)
    feeds = [{"x": np.ones((1, size, 3), np.float32)} for size in (2, 2, 4)]
    samples = load_samples(feeds, input_specs(network.model), None)
    assert channel_ranges(network, samples, RUNTIME) == {}
    assert channel_ranges(network, samples.by_shape()[0], RUNTIME)["a"].shape == (2, 1)

"""Mean and covariance of every layer's input, against numpy over all samples and positions at once."""

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.normalization import NORMALIZE
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.candidates import blocks, moment_passes
from rdoq_onnx.candidates.blocks import in_parts
from rdoq_onnx.candidates.moment_passes import collect, first_of_input, passes, portions, second_bytes
from rdoq_onnx.candidates.moments import Moments
from rdoq_onnx.config import Config
from rdoq_onnx.model.linear import Linear
from rdoq_onnx.passes import run_passes
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.threads import workers

RUNTIME = Runtime("cpu", 1)
COUNT = 7


def windows(x, kernel, pads=(0, 0), strides=(1, 1), group=1):
    """[N, C, H, W] -> all input patches of a convolution, [G, C/G·kh·kw, N·positions]."""
    x = np.pad(x, [(0, 0), (0, 0), (pads[0],) * 2, (pads[1],) * 2])
    rows, columns = ((n - k) // s + 1 for n, k, s in zip(x.shape[2:], kernel, strides, strict=True))
    found = []
    for i in range(rows):
        for j in range(columns):
            top, left = i * strides[0], j * strides[1]
            patch = x[:, :, top : top + kernel[0], left : left + kernel[1]]
            found.append(patch.reshape(len(x), group, -1))
    return np.concatenate(found).transpose(1, 2, 0)


def by_vector(x):
    """[..., K] -> [1, K, N·positions]."""
    return x.reshape(1, -1, x.shape[-1]).swapaxes(1, 2)


# node, shape of a sample, shape of the weight, (samples x) -> inputs [G, K, ·]
LAYERS = {
    "conv": ("y = Conv (x, w)", (4, 5, 6), (3, 4, 3, 2), lambda x: windows(x, (3, 2))),
    "padding and strides": (
        "y = Conv <pads = [1, 2, 1, 2], strides = [2, 1]> (x, w)",
        (4, 5, 6),
        (3, 4, 3, 2),
        lambda x: windows(x, (3, 2), (1, 2), (2, 1)),
    ),
    "groups": (
        "y = Conv <group = 2, pads = [1, 1, 1, 1]> (x, w)",
        (4, 5, 6),
        (6, 2, 3, 3),
        lambda x: windows(x, (3, 3), (1, 1), group=2),
    ),
    "depthwise": ("y = Conv <group = 4> (x, w)", (4, 5, 6), (4, 1, 3, 3), lambda x: windows(x, (3, 3), group=4)),
    "transposed": (
        "y = ConvTranspose <group = 2, strides = [2, 2]> (x, w)",
        (4, 5, 6),
        (4, 3, 1, 1),
        # A 1x1 kernel has each value as its input once, followed by three zeros, except at the far edges.
        lambda x: windows(np.kron(x, [[1, 0], [0, 0]])[..., :-1, :-1], (1, 1), group=2),
    ),
    "gemm": ("y = Gemm (x, w)", (6,), (6, 3), by_vector),
    "gemm with factors": ("y = Gemm <alpha = 0.5, transB = 1> (x, w)", (6,), (3, 6), lambda x: 0.5 * by_vector(x)),
    "matmul": ("y = MatMul (x, w)", (5, 6), (6, 3), by_vector),
    "matmul on the left": ("y = MatMul (w, x)", (5, 6), (3, 5), lambda x: by_vector(x.swapaxes(1, 2))),
}


def build(nodes, sample, output_rank, weights, rng):
    """(analysed network, samples) with random weights of the shapes given."""
    free = ", ".join("ABCD"[: output_rank - 1])
    model = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, {", ".join(map(str, sample))}] x) => (float[N, {free}] y) {{ {nodes} }}""")
    for name, shape in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape, np.float32), name))
    network = analyse(run_passes(NORMALIZE, model), Config().selection)
    # Off zero, so that the covariance is not the second moment; and channels that depend on one another.
    x = rng.standard_normal((COUNT, *sample), np.float32) + 1.5
    x[:, 1] += x[:, 0]
    return network, Samples("test", {"x": x})


def collected(network, samples, batch=3):
    done = []
    with workers(2) as pool:
        found = collect(network, samples, batch, RUNTIME, pool, done.append)
    assert sum(done) == len(samples) * passes(network)
    return found


def expect(moment, inputs):
    """Compare with numpy. inputs: [G, K, ·], all input vectors of the layer."""
    np.testing.assert_allclose(moment.mean, inputs.mean(axis=2), rtol=1e-4, atol=1e-5)
    covariance = np.stack([np.cov(g.astype(np.float64), bias=True).reshape(len(g), len(g)) for g in inputs])
    np.testing.assert_allclose(moment.covariance, covariance, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
def test_against_numpy(kind):
    node, sample, shape, inputs = LAYERS[kind]
    network, samples = build(node, sample, len(sample) + 1, {"w": shape}, np.random.default_rng(0))
    (moment,) = collected(network, samples)
    assert moment.mean.dtype == moment.covariance.dtype == np.float64
    expect(moment, inputs(samples.arrays["x"]))


def test_moments_of_a_later_layer():
    nodes = "z = Conv (x, w) a = Relu (z) y = Conv <pads = [1, 1, 1, 1]> (a, v)"
    weights = {"w": (5, 4, 1, 1), "v": (3, 5, 3, 3)}
    network, samples = build(nodes, (4, 5, 6), 4, weights, np.random.default_rng(1))
    first, second = collected(network, samples)
    x = samples.arrays["x"]
    expect(first, windows(x, (1, 1)))
    weight = numpy_helper.to_array(next(t for t in network.model.graph.initializer if t.name == "w"))
    expect(second, windows(np.maximum(np.einsum("oc,nchw->nohw", weight[:, :, 0, 0], x), 0), (3, 3), (1, 1)))


def test_a_shared_weight_has_the_inputs_of_all_its_uses():
    nodes = "a = MatMul (x, w) b = Tanh (x) c = MatMul (b, w) y = Add (a, c)"
    network, samples = build(nodes, (5, 6), 3, {"w": (6, 3)}, np.random.default_rng(2))
    (moment,) = collected(network, samples)
    x = samples.arrays["x"]
    expect(moment, np.concatenate([by_vector(x), by_vector(np.tanh(x))], axis=2))


@pytest.mark.parametrize("kind", ["groups", "matmul"])
def test_the_batch_does_not_matter(kind):
    node, sample, shape, _ = LAYERS[kind]
    network, samples = build(node, sample, len(sample) + 1, {"w": shape}, np.random.default_rng(3))
    (whole,) = collected(network, samples, batch=COUNT)
    for batch in (1, 3):
        (moment,) = collected(network, samples, batch)
        np.testing.assert_allclose(moment.mean, whole.mean, rtol=1e-6)
        np.testing.assert_allclose(moment.covariance, whole.covariance, rtol=1e-4, atol=1e-5)


def test_variances_are_not_negative():
    """Not even of a constant input far from zero, where sums of squares cancel."""
    network, samples = build("y = Gemm (x, w)", (6,), 2, {"w": (6, 3)}, np.random.default_rng(4))
    samples.arrays["x"][:, 2] = 12345.678
    (moment,) = collected(network, samples)
    assert np.all(np.diag(moment.covariance[0]) >= 0)
    np.testing.assert_allclose(moment.mean[0, 2], 12345.678, rtol=1e-6)


def test_several_passes_over_the_samples_if_memory_is_short(monkeypatch):
    nodes = "z = Conv (x, w) a = Relu (z) y = Conv <pads = [1, 1, 1, 1]> (a, v)"
    network, samples = build(nodes, (4, 5, 6), 4, {"w": (5, 4, 1, 1), "v": (3, 5, 3, 3)}, np.random.default_rng(5))
    assert passes(network) == 1
    at_once = collected(network, samples)
    monkeypatch.setattr(moment_passes, "MEMORY", 1)
    assert passes(network) == 2
    for a, b in zip(at_once, collected(network, samples), strict=True):
        np.testing.assert_array_equal(a.mean, b.mean)
        np.testing.assert_array_equal(a.covariance, b.covariance)


@pytest.mark.parametrize("most", [1, 4, 5, 17, 18])
@pytest.mark.parametrize("kind", ["conv", "groups", "gemm"])
def test_wide_layers_have_a_covariance_for_each_part(monkeypatch, kind, most):
    node, sample, shape, inputs = LAYERS[kind]
    network, samples = build(node, sample, len(sample) + 1, {"w": shape}, np.random.default_rng(6))
    monkeypatch.setattr(blocks, "MOST_INPUTS", most)
    (moment,) = collected(network, samples)
    values = inputs(samples.arrays["x"])
    groups, count = values.shape[:2]
    parts = -(-count // most)
    width = moment.covariance.shape[1]
    assert moment.covariance.shape == (groups * parts, width, width)
    assert width <= most
    np.testing.assert_allclose(moment.mean, values.mean(axis=2), rtol=1e-4, atol=1e-5)
    for g in range(groups):
        whole = np.cov(values[g].astype(np.float64), bias=True)
        for p in range(parts):
            block = moment.covariance[g * parts + p]
            own = slice(p * width, min((p + 1) * width, count))
            filled = own.stop - own.start
            np.testing.assert_allclose(block[:filled, :filled], whole[own, own], rtol=1e-4, atol=1e-4)
            assert not block[filled:].any()
            assert not block[:, filled:].any()


def test_parts_hold_all_inputs_in_order(monkeypatch):
    values = np.arange(2 * 11 * 3.0).reshape(2, 11, 3)
    assert in_parts(values) is values
    for most in range(1, 13):
        monkeypatch.setattr(blocks, "MOST_INPUTS", most)
        parts = in_parts(values)
        together = parts.reshape(2, -1, 3)
        np.testing.assert_array_equal(together[:, :11], values)
        assert not together[:, 11:].any()
        assert parts.shape[1] <= most


def test_a_linear_that_unfolds_by_itself_agrees():
    """Check the plain loop above against `Linear.unfold`."""
    x = np.random.default_rng(7).standard_normal((2, 4, 5, 6))
    unfolded = Linear("Conv", (6, 2, 3, 3), group=2, pads=(1, 1, 1, 1)).unfold(x, 2)
    plain = windows(x, (3, 3), (1, 1), group=2)
    flat = np.moveaxis(unfolded, 0, 3).reshape(*plain.shape)
    np.testing.assert_allclose(flat, plain)


POOLS = {
    "global pool": "p = GlobalAveragePool (x) v = Flatten (p) y = Gemm <transB = 1> (v, w)",
    "mean over the axes of space": "v = ReduceMean <axes = [-1, 2], keepdims = 0> (x) y = Gemm <transB = 1> (v, w)",
}


@pytest.mark.parametrize("nodes", POOLS.values(), ids=POOLS)
def test_behind_a_pool_positions_stand_in_for_missing_samples(nodes):
    network, samples = build(nodes, (6, 4, 3), 2, {"w": (3, 6)}, np.random.default_rng(5))
    (found,) = collected(network, samples)
    x = samples.arrays["x"].astype(np.float64)
    own, positions = x.mean(axis=(2, 3)).T, np.moveaxis(x, 1, 0).reshape(6, -1)
    covariance, target = np.cov(own, bias=True), np.cov(positions, bias=True)
    target *= np.trace(covariance) / np.trace(target)
    share = 6 / (6 + COUNT)
    np.testing.assert_allclose(found.covariance[0], (1 - share) * covariance + share * target, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.mean[0], own.mean(axis=1), rtol=1e-4)


NO_POOLS = {
    "positions are left": ("v = ReduceMean <axes = [1, 2], keepdims = 0> (x) y = MatMul (v, w)", (1, 2)),
    "values change on the way": ("p = GlobalAveragePool (x) q = Flatten (p) v = Relu (q) y = MatMul (v, w)", (2, 3)),
}


@pytest.mark.parametrize(("nodes", "axes"), NO_POOLS.values(), ids=NO_POOLS)
def test_other_means_are_not_pools(nodes, axes):
    network, samples = build(nodes, (4, 4, 4), 2, {"w": (4, 3)}, np.random.default_rng(5))
    (found,) = collected(network, samples)
    expect(found, by_vector(np.maximum(samples.arrays["x"].mean(axis=axes), 0)))


def test_some_positions_represent_many():
    """One of 14 of the 238 x 238 positions is used."""
    network, samples = build("y = Conv (x, w)", (4, 240, 240), 4, {"w": (3, 4, 3, 3)}, np.random.default_rng(5))
    (found,) = collected(network, samples)
    (vectors,) = windows(samples.arrays["x"], (3, 3)).astype(np.float64)
    covariance = np.cov(vectors, bias=True)
    assert 0 < np.linalg.norm(found.covariance[0] - covariance) < 0.05 * np.linalg.norm(covariance)
    assert 0 < np.abs(found.mean[0] - vectors.mean(axis=1)).max() < 0.03


def test_layers_that_read_the_same_input_share_its_moments():
    nodes = "a = MatMul (x, q) b = MatMul (x, k) c = Mul (a, b) y = MatMul (c, v)"
    network, _ = build(nodes, (5, 6), 3, {"q": (6, 8), "k": (6, 8), "v": (8, 3)}, np.random.default_rng(0))
    layers = network.layers
    first = first_of_input(layers)
    assert [first[layer.name].name for layer in layers] == [layers[0].name, layers[0].name, layers[2].name]
    own, both = second_bytes(layers[0]), second_bytes(layers[2])
    assert (own, both) == (8 * 6 * 6, 8 * 8 * 8)

    def sizes(memory, shared=True):
        return [len(portion) for portion in portions(layers, memory, shared)]

    assert sizes(own + both) == [3]
    assert sizes(own) == [2, 1]
    assert sizes(own, shared=False) == [1, 1, 1]
    assert sizes(2 * own, shared=False) == [2, 1]
    assert sizes(1) == [2, 1]


@pytest.mark.parametrize(("vectors", "least"), [(0, 0.0), (4, 0.5), (16, 0.125), (4096, 0.5 * 4 / 4096)])
def test_few_vectors_damp_more(vectors, least):
    moments = Moments(np.zeros((1, 4)), np.eye(4)[None], np.eye(4)[None], vectors)
    assert moments.least_damping == least
    assert [damping for _, damping in moments.variants()] == [max(0.02, least), max(0.02, least), max(0.1, least)]

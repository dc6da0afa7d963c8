"""Exact curves against Eq. 7 and 8 taken literally: change the model, run it, compare outputs."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.observation.batching import Batching
from tests.cases import Case

LAYERS = {
    "conv": "z = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w, b)",
    "groups": "z = Conv <pads = [1, 1, 1, 1], group = 2> (x, w, b)",
    "transposed": "z = ConvTranspose <strides = [2, 2], group = 2> (x, w)",
    "matmul": "z = MatMul (x, w)",
    "matmul on the left": "z = MatMul (w, x)",
}
SHAPES = {
    "conv": (6, 4, 3, 3),
    "groups": (6, 2, 3, 3),
    "transposed": (4, 3, 2, 2),
    "matmul": (6, 5),
    "matmul on the left": (5, 6),
}


def named(model):
    """`model`, its nodes named n0, n1, ..."""
    for k, node in enumerate(model.graph.node):
        node.name = f"n{k}"
    return model


def network(rng, kind):
    """Return a layer between an input and a nonlinear output that mixes all of its channels, and samples."""
    text = f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 4, 6, 6] x) => (float[N, 1, 1, 1] y, float[N, A, B, C] t)
    {{ {LAYERS[kind]} t = Tanh (z) u = Mul (t, t) y = ReduceMean <axes = [1, 2, 3]> (u) }}"""
    model = named(parser.parse_model(text))
    weights = {"w": rng.standard_normal(SHAPES[kind], np.float32), "b": rng.standard_normal(6, np.float32)}
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in weights.items())
    samples = {"x": rng.standard_normal((5, 4, 6, 6), np.float32)}
    return model, samples


def distance(metric, ort_run, model, samples, changed, changed_samples=None):
    names = [o.name for o in model.graph.output]
    pick = [names.index(o) for o in metric.outputs]
    reference, values = ort_run(model, samples), ort_run(changed, changed_samples or samples)
    count = len(samples["x"])
    return metric.errors([values[k] for k in pick], [reference[k] for k in pick], count).mean()


@pytest.mark.parametrize("kind", LAYERS)
def test_channels_against_changed_weights(ort_run, kind):
    model, samples = network(np.random.default_rng(3), kind)
    case = Case(model, samples, widths=(0, 2, 5))
    (layer,) = case.network.layers
    codes = case.candidates.layers[0].variants[0]
    curve = case.prober.layer(layer, codes)
    assert curve.shape == (layer.linear.channels, 3)
    original = numpy_helper.to_array(model.graph.initializer[0])
    for unit in range(layer.linear.channels):
        for column, code in enumerate(codes):
            rows = layer.linear.rows(original).copy()
            rows[unit] = code.values[unit]
            changed = onnx.ModelProto()
            changed.CopyFrom(model)
            changed.graph.initializer[0].CopyFrom(numpy_helper.from_array(layer.linear.tensor(rows), "w"))
            expected = distance(case.seen.metric, ort_run, model, samples, changed)
            assert curve[unit, column] == pytest.approx(expected, rel=1e-3)


def test_activations_against_a_changed_input(ort_run):
    model, samples = network(np.random.default_rng(4), "conv")
    case = Case(model, samples, widths=(4,))
    index = next(k for k, a in enumerate(case.network.activations) if a.tensor == "x")
    quantizers = case.candidates.activations[index].flat
    curve = case.prober.activation(case.network.activations[index], quantizers)
    for quantizer, value in zip(quantizers, curve, strict=True):
        expected = distance(case.seen.metric, ort_run, model, samples, model, {"x": quantizer(samples["x"])})
        assert value == pytest.approx(expected, rel=1e-3)


def test_stacking_perturbations_does_not_change_curves():
    model, samples = network(np.random.default_rng(5), "conv")
    stacked, alone = Case(model, samples), Case(model, samples, batching=Batching(1, False))
    assert stacked.batching.stackable
    arguments = stacked.network.layers[0], stacked.candidates.layers[0].variants[0]
    np.testing.assert_allclose(stacked.prober.layer(*arguments), alone.prober.layer(*arguments), rtol=1e-4)


def test_a_corrected_bias_absorbs_the_mean():
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 5] x) => (float[N, 6] y) { y = MatMul (x, w) }""")
    rng = np.random.default_rng(7)
    weight = rng.standard_normal((5, 6), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    samples = {"x": rng.standard_normal((8, 5), np.float32) + 2}
    case = Case(model, samples, widths=(2,))
    (code,), mean = case.candidates.layers[0].variants[0], case.candidates.layers[0].mean
    curve = case.prober.layer(case.network.layers[0], (code,), mean)
    moved = (samples["x"] - samples["x"].mean(axis=0)) @ (code.values.T - weight)
    np.testing.assert_allclose(curve[:, 0], np.square(moved).mean(axis=0) / 6, rtol=1e-3)


def shared_weight(nodes, seed):
    """Return a weight, a network of `nodes` that share it, and samples."""
    text = f'<ir_version: 8, opset_import: ["": 17]> g (float[N, 6] x) => (float[N, 6] y) {{ {nodes} }}'
    rng = np.random.default_rng(seed)
    model = named(parser.parse_model(text))
    weight = rng.standard_normal((6, 6), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return weight, model, {"x": rng.standard_normal((7, 6), np.float32)}


def test_a_weight_shared_by_two_layers_is_perturbed_in_both():
    weight, model, samples = shared_weight("a = MatMul (x, w) b = Tanh (x) c = MatMul (b, w) y = Add (a, c)", seed=6)
    case = Case(model, samples, widths=(0, 2, 5))
    (layer,) = case.network.layers
    codes = case.candidates.layers[0].variants[0]
    assert [use.node for use in layer.uses] == ["n0", "n2"]
    change = codes[1].values.T - weight
    both = (samples["x"] + np.tanh(samples["x"])) @ change
    curve = case.prober.layer(layer, codes)
    np.testing.assert_allclose(curve[:, 1], np.square(both).mean(axis=0) / 6, rtol=1e-3)


def test_a_weight_shared_by_two_layers_one_behind_the_other():
    weight, model, samples = shared_weight("a = MatMul (x, w) b = Tanh (a) y = MatMul (b, w)", seed=8)
    case = Case(model, samples, widths=(2, 5))
    code = case.candidates.layers[0].variants[0][0]
    changed = code.values.T.astype(np.float64)
    # Eq. 2: both Adds are fed op(x, ΔW), the second with the float network's x.
    x, change = samples["x"].astype(np.float64), changed - weight
    first, second = x @ weight, np.tanh(x @ weight)
    moved = np.tanh(first + x @ change) @ weight + second @ change - second @ weight
    found = case.prober.whole_layer(case.network.layers[0], [code])
    np.testing.assert_allclose(found, [np.square(moved).mean()], rtol=1e-3)


OTHER_TENSORS = {
    "an output that the layer does not reach": (
        "(float[N, 6] y, float[N, 4] t) { z = MatMul (x, w) y = Tanh (z) r = Relu (x) t = MatMul (r, v) }"
    ),
    "a tensor that is the same for any batch": (
        "(float[N, 6] y) { z = MatMul (x, w) n = Shape <start = 1> (x) f = Cast <to = 1> (n) d = Sin (f) "
        "a = Add (z, d) y = Tanh (a) }"
    ),
    "a shape that follows the batch": (
        "(float[M, 3] y) { z = MatMul (x, w) n = Shape <end = 1> (x) s = Concat <axis = 0> (n, pair) "
        "p = Reshape (z, s) q = Tanh (p) y = ReduceSum <keepdims = 0> (q, axis) }"
    ),
    "more rows than samples": (
        "(float[N, 6] y) { r = Reshape (x, rows) t = Relu (r) u = MatMul (t, m) a = Add (u, t) "
        "b = Reshape (a, back) y = MatMul (b, w) }"
    ),
}


@pytest.mark.parametrize("kind", OTHER_TENSORS)
def test_tensors_beside_the_perturbed_one(kind):
    """Curves of stacked samples and perturbations equal those of one sample and one perturbation per run."""
    model = named(
        parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g (float[N, 6] x) => {OTHER_TENSORS[kind]}')
    )
    rng = np.random.default_rng(9)
    shapes = {"w": (6, 6), "v": (6, 4), "m": (3, 3)}
    values = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    values |= {"pair": [2, 3], "axis": [1], "rows": [-1, 3], "back": [-1, 6]}
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(np.array(v), n) for n, v in values.items() if n in read)
    samples = {"x": rng.standard_normal((6, 6)).astype(np.float32)}
    stacked = Case(model, samples, widths=(2, 4), batching=Batching(4, True))
    assert stacked.seen.batching.stackable
    alone = replace(stacked.prober, batching=Batching(1, False))
    for each in stacked.candidates.layers:
        arguments = each.layer, each.variants[0], each.mean
        expected = alone.layer(*arguments)
        assert (expected[:, 0] > 0).any()
        np.testing.assert_allclose(stacked.prober.layer(*arguments), expected, rtol=1e-4)


def test_a_scalar_that_decides_which_branch_runs():
    """It is the same in every run and cannot be batched; the branch mixes the samples."""
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 6] x, bool c) => (float[N, 6] y) { z = MatMul (x, w) y = If (c) <
        then_branch = g1 () => (float[N, 6] t) { m = ReduceMean (z) t = Add (z, m) },
        else_branch = g2 () => (float[N, 6] e) { e = Relu (z) }> }""")
    rng = np.random.default_rng(3)
    model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal((6, 6), np.float32), "w"))
    case = Case(model, {"x": rng.standard_normal((5, 6), np.float32), "c": np.array(True)}, widths=(0, 4))
    assert not case.batching.stackable
    found = case.probe()
    assert (found.weights[0][0][0] > found.weights[0][0][1]).all()
    assert np.isfinite(list(found.activations[0].values())).all()


@pytest.mark.parametrize("kind", LAYERS)
def test_powers_are_the_curves_of_a_single_layer_network(kind):
    model, samples = network(np.random.default_rng(3), kind)
    del model.graph.node[1:], model.graph.output[0]
    model.graph.output[0].name = "z"
    case = Case(model, samples, widths=(0, 2, 5))
    (layer,), metric, mean = case.network.layers, case.seen.metric, case.candidates.layers[0].mean
    codes = case.candidates.layers[0].variants[0]
    powers = case.prober.powers(layer, codes, mean) * metric.weights[0] ** 2 / metric.elements
    np.testing.assert_allclose(powers, case.prober.layer(layer, codes, mean), rtol=1e-4, atol=1e-12)

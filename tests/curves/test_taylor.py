"""First-order curves against exact ones and small perturbations, and their independence of batching."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from scipy.stats import spearmanr

import rdoq_onnx
from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.config import Config
from rdoq_onnx.curves.taylor import first_order
from rdoq_onnx.probing.missing_curves import complete
from rdoq_onnx.system.progress import Unfinished
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.threads import workers
from tests.cases import Case, ignore
from tests.conftest import ROOT

MODELS = ROOT / "models"


def stacked(measured, least=2):
    """Stack all points from `least` bits up, of weights and activations."""
    weights = [w[..., least:].ravel() for w in measured.weights]
    activations = [v for table in measured.activations for bits, v in table.items() if bits >= least]
    return np.concatenate([*weights, *activations])


@pytest.fixture(scope="module")
def digits():
    return Case(MODELS / "digits_cnn.onnx", MODELS / "digits_calib.npz", 8)


def test_ranks_as_the_exact_curves_do(digits):
    first, true = digits.taylor(), digits.probe()
    assert spearmanr(stacked(first), stacked(true)).statistic >= 0.98
    weights = [np.concatenate([w[..., 2:].ravel() for w in m.weights]) for m in (first, true)]
    assert spearmanr(*weights).statistic >= 0.98
    # For small perturbations the curves also agree in size.
    ends = [np.concatenate([w[..., 7].ravel() for w in m.weights]) for m in (first, true)]
    ratio = ends[0] / ends[1]
    assert 0.95 < np.median(ratio) < 1.05


def test_does_not_depend_on_the_batch(digits):
    np.testing.assert_allclose(stacked(digits.taylor(batch=3)), stacked(digits.taylor(batch=8)), rtol=2e-3)


def wide_network(outputs):
    """Return a network of two layers with `outputs` outputs, its weights, and samples."""
    rng = np.random.default_rng(1)
    model = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 5] x) => (float[N, {outputs}] y) {{ a = MatMul (x, w) b = Tanh (a) y = Gemm (b, v) }}""")
    arrays = {"w": rng.standard_normal((5, 7), np.float32), "v": rng.standard_normal((7, outputs), np.float32)}
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in arrays.items())
    return model, arrays, {"x": rng.standard_normal((200, 5), np.float32)}


@pytest.mark.parametrize("outputs", [3, 16])
def test_weights_against_the_jacobian(outputs):
    """δ = E‖J Δ‖² / D with explicit J; Δz = ΔW(x - E[x]), as the bias absorbs the mean."""
    model, arrays, samples = wide_network(outputs)
    case = Case(model, samples)
    measured = case.taylor().weights[0][0]
    slope = 1 - np.tanh(samples["x"] @ arrays["w"]) ** 2
    for column, codes in enumerate(case.candidates.layers[0].variants[0]):
        change = (samples["x"] - samples["x"].mean(axis=0)) @ (codes.values.T - arrays["w"])
        for unit in range(7):
            moved = (change * slope)[:, unit, None] * arrays["v"][None, unit]
            expected = np.square(moved).sum(axis=1).mean() / outputs
            assert measured[unit, column] == pytest.approx(expected, rel=1e-3, abs=1e-12)


def test_signs_are_unbiased():
    model, _, samples = wide_network(40)
    case = Case(model, samples)
    estimates = np.mean([stacked(case.taylor(seed=s)) for s in range(30)], axis=0)
    exact_curves = stacked(case.probe())
    small = exact_curves < np.median(exact_curves)  # where first order is accurate
    assert np.median(estimates[small] / exact_curves[small]) == pytest.approx(1, abs=0.05)


def test_tensors_without_an_adjoint_are_probed_and_reported():
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 5] x) => (float[N, 6] y)
    <int64[4] pads = {0, 1, 0, 1}>
    { a = MatMul (x, w) t = Tanh (a) b = Pad <mode = "edge"> (t, pads) y = MatMul (b, v) }""")
    rng = np.random.default_rng(2)
    arrays = {"w": rng.standard_normal((5, 7), np.float32), "v": rng.standard_normal((9, 6), np.float32)}
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in arrays.items())
    samples = {"x": rng.standard_normal((9, 5), np.float32)}
    case = Case(model, samples)
    measured = case.taylor()
    assert set(measured.missing) == {"a", "t", "x"}
    assert all("Pad" in reason for reason in measured.missing.values())
    completed, true = complete(measured, case.candidates, case.prober, 30, ignore), case.probe()
    np.testing.assert_allclose(completed.weights[0], true.weights[0])  # probed
    np.testing.assert_array_equal(completed.weights[1], measured.weights[1])  # as it was
    result = rdoq_onnx.quantize(model, samples, bits=6, provider="cpu")
    assert set(result.report.probed) == {"a", "t", "x"}
    assert result.report.sqnr_db > 15


@pytest.mark.parametrize("work", [400, 0], ids=["each channel at one width", "each layer at one width"])
def test_curves_too_costly_to_probe_are_scaled_from_fewer_runs(work):
    """The second of 16 channels matters 100 times as much as the others, which runs of whole layers cannot detect."""
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 3, 8, 8] x) => (float[N, 5] y)
    <int64[8] pads = {0, 0, 1, 1, 0, 0, 1, 1}>
    { a = Conv (x, w) t = Tanh (a) b = Pad <mode = "edge"> (t, pads) c = Flatten (b) y = MatMul (c, v) }""")
    rng = np.random.default_rng(2)
    v = rng.standard_normal((16, 8, 8, 5), np.float32)
    v[1] *= 10
    arrays = {"w": rng.standard_normal((16, 3, 3, 3), np.float32) / 3, "v": v.reshape(-1, 5)}
    model.graph.initializer.extend(numpy_helper.from_array(a, k) for k, a in arrays.items())
    case = Case(model, {"x": rng.standard_normal((24, 3, 8, 8), np.float32)})
    measured, true = case.taylor(), case.probe()
    found = complete(measured, case.candidates, case.prober, 1, ignore, work)
    fine = slice(3, None)  # widths at which first order holds
    ours, theirs = found.weights[0][0][:, fine], true.weights[0][0][:, fine]
    np.testing.assert_array_equal(found.weights[1], measured.weights[1])  # as it was
    if work:  # the gain of each channel is measured
        assert spearmanr(ours, theirs, axis=None).statistic > 0.97
        assert np.median(ours / theirs) == pytest.approx(1, abs=0.1)
    else:
        others = np.arange(16) != 1
        assert spearmanr(ours[others], theirs[others], axis=None).statistic > 0.95
        assert ours.sum(axis=0) == pytest.approx(theirs.sum(axis=0), rel=0.5)


POOLED = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 2, 9, 9] x) => (float[N, 12, 1, 1] y) {
    a = Conv (x, w) b = Relu (a) c = MaxPool <kernel_shape = [3, 3], strides = [2, 2]> (b) READ y = Conv (c, v)
}"""


def pooled_network(read=""):
    """Return a Relu in front of a MaxPool, and samples. read: another consumer of the Relu."""
    rng = np.random.default_rng(4)
    model = parser.parse_model(POOLED.replace("READ", read))
    arrays = {"w": rng.standard_normal((3, 2, 3, 3), np.float32), "v": rng.standard_normal((12, 3, 3, 3), np.float32)}
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in arrays.items())
    return model, {"x": rng.standard_normal((6, 2, 9, 9), np.float32)}


def test_an_activation_is_measured_behind_its_pooling(monkeypatch):
    case = Case(*pooled_network())
    assert case.network.sites == {"x": "x", "b": "c"}
    behind = case.taylor()
    monkeypatch.setattr(type(case.network), "sites", {"x": "x", "b": "b"})
    itself = Case(*pooled_network()).taylor()
    for found, expected in zip(behind.activations, itself.activations, strict=True):
        for bits in expected:
            np.testing.assert_allclose(found[bits], expected[bits], rtol=1e-4)


def test_an_activation_with_another_consumer_than_its_pooling_is_measured_itself():
    model, _ = pooled_network("z = Exp (b)")
    model.graph.output.append(onnx.helper.make_tensor_value_info("z", 1, ["N", 3, 7, 7]))
    assert analyse(model, Config().selection).sites["b"] == "b"


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_each_sample_weighs_the_same_whatever_its_length(pooled, in_graph, monkeypatch):
    """δ is the mean of those of the samples, each over the elements of its own output."""
    head, shape = ("y = ReduceMean <axes = [2], keepdims = 1> (z)", "1") if pooled else ("y = Identity (z)", "T")
    model = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 3, T] x) => (float[N, 2, {shape}] y) {{
        h = Conv <pads = [1, 1]> (x, w) a = Relu (h) z = Conv (a, v) {head} }}""")
    rng = np.random.default_rng(2)
    arrays = {"w": rng.standard_normal((4, 3, 3), np.float32), "v": rng.standard_normal((2, 4, 1), np.float32)}
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in arrays.items())
    x = {size: rng.standard_normal((count, 3, size), np.float32) for size, count in ((3, 4), (5, 2))}
    case = Case(model, [{"x": row} for size in (5, 3) for row in x[size]])
    assert [len(part) for part in case.samples.by_shape()] == [4, 2]
    own = [Case(model, {"x": part}) for part in x.values()]
    for each in own:
        each.candidates = case.candidates
        each.prober = replace(each.prober, metric=each.seen.metric)
    monkeypatch.setattr(Runtime, "in_graph", in_graph)
    for curves in (Case.taylor, Case.probe):
        short, long = (stacked(curves(each)) for each in own)
        np.testing.assert_allclose(stacked(curves(case)), (4 * short + 2 * long) / 6, rtol=1e-3, atol=1e-9)
    power = (4 * own[0].seen.metric.power + 2 * own[1].seen.metric.power) / 6
    assert case.seen.metric.power == pytest.approx(power, rel=1e-6)


def test_measuring_continues_in_the_middle_of_a_shape():
    model, _, _ = wide_network(40)
    model.graph.input[0].type.tensor_type.shape.dim.insert(1, onnx.TensorShapeProto.Dimension(dim_param="T"))
    model.graph.node[2].op_type = "MatMul"
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.shape.dim.extend(
        [onnx.TensorShapeProto.Dimension(dim_param=n) for n in "NT"] + [onnx.TensorShapeProto.Dimension(dim_value=40)]
    )
    rng = np.random.default_rng(0)
    case = Case(model, [{"x": rng.standard_normal((1, 2 + k % 2, 5), np.float32)} for k in range(9)])
    kept, states = Unfinished(), []
    monitored = SimpleNamespace(get=lambda: None, put=lambda state: states.append(copy.deepcopy(state)))
    with workers(2) as pool:
        plan = case.plan(pool, 2)
        whole = first_order(plan, case.candidates, ignore, monitored)
        for state in states[:: len(states) // 4]:
            kept.put(state)
            done = []
            again = first_order(
                plan, case.candidates, done.append, SimpleNamespace(get=lambda s=state: copy.deepcopy(s), put=kept.put)
            )
            np.testing.assert_array_equal(stacked(again), stacked(whole))
            assert sum(done) == 4 * 9

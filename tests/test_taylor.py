"""First-order curves: against exact ones, against small perturbations, and what they must not depend on."""

from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper, parser
from scipy.stats import spearmanr

from rdoq_onnx import pipeline
from rdoq_onnx.analysis import analyse
from rdoq_onnx.candidates import make_candidates
from rdoq_onnx.config import Config
from rdoq_onnx.measurement import measure_network
from rdoq_onnx.observation import observe
from rdoq_onnx.probe import Prober, exact
from rdoq_onnx.progress import Progress
from rdoq_onnx.runtime import Runtime
from rdoq_onnx.taylor import first_order

MODELS = Path(__file__).parents[1] / "models"
RUNTIME = Runtime("cpu", 2)
WIDTHS = tuple(range(8))


def ignore(done):
    """Nobody watches."""


class Case:
    """A model with samples, observed, with all candidates."""

    def __init__(self, model, calibration, count=None):
        config = Config(samples=count)
        self.model = pipeline.read_normalized(model)[1]
        self.samples = pipeline.samples_for(self.model, calibration, config)
        self.network = analyse(self.model, config)
        self.seen = observe(self.network, self.samples, RUNTIME)
        self.candidates = make_candidates(self.network, WIDTHS, self.seen.ranges)

    def taylor(self, batch=None, seed=0):
        return first_order(
            self.network, self.candidates, self.samples, self.seen.metric, RUNTIME,
            batch=batch or self.seen.batching.size, seed=seed, advance=ignore,
        )  # fmt: skip

    def probe(self):
        prober = Prober(self.network, self.samples, self.seen.metric, RUNTIME, self.seen.batching)
        return exact(self.network, self.candidates, prober, advance=ignore)


def stacked(measured, least=2):
    """All points from `least` bits up, weights and activations."""
    weights = [w[:, least:].ravel() for w in measured.weights]
    activations = [v for table in measured.activations for bits, v in table.items() if bits >= least]
    return np.concatenate([*weights, *activations])


@pytest.fixture(scope="module")
def digits():
    return Case(MODELS / "digits_cnn.onnx", MODELS / "digits_calib.npz", 8)


def test_ranks_as_the_exact_curves_do(digits):
    first, true = digits.taylor(), digits.probe()
    assert spearmanr(stacked(first), stacked(true)).statistic >= 0.98
    weights = [np.concatenate([w[:, 2:].ravel() for w in m.weights]) for m in (first, true)]
    assert spearmanr(*weights).statistic >= 0.98
    # Where perturbations are small the curves agree in size, too.
    ratio = np.concatenate([w[:, 7] for w in first.weights]) / np.concatenate([w[:, 7] for w in true.weights])
    assert 0.95 < np.median(ratio) < 1.05


def test_does_not_depend_on_the_batch(digits):
    np.testing.assert_allclose(stacked(digits.taylor(batch=3)), stacked(digits.taylor(batch=8)), rtol=2e-3)


def wide_network(outputs):
    """Two layers with `outputs` outputs, and samples."""
    rng = np.random.default_rng(1)
    model = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 5] x) => (float[N, {outputs}] y) {{ a = MatMul (x, w) b = Tanh (a) y = Gemm (b, v) }}""")
    arrays = {"w": rng.standard_normal((5, 7), np.float32), "v": rng.standard_normal((7, outputs), np.float32)}
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in arrays.items())
    return model, arrays, {"x": rng.standard_normal((200, 5), np.float32)}


@pytest.mark.parametrize("outputs", [3, 16])
def test_weights_against_the_jacobian(outputs):
    """δ = E‖J Δ‖² / D, with J written out."""
    model, arrays, samples = wide_network(outputs)
    case = Case(model, samples)
    measured = case.taylor().weights[0]
    slope = 1 - np.tanh(samples["x"] @ arrays["w"]) ** 2
    for column, codes in enumerate(case.candidates.weights[0]):
        change = samples["x"] @ (codes.values.T - arrays["w"])
        for unit in range(7):
            moved = (change * slope)[:, unit, None] * arrays["v"][None, unit]
            expected = np.square(moved).sum(axis=1).mean() / outputs
            assert measured[unit, column] == pytest.approx(expected, rel=1e-3, abs=1e-12)


def test_signs_are_unbiased():
    model, _, samples = wide_network(40)
    case = Case(model, samples)
    estimates = np.mean([stacked(case.taylor(seed=s)) for s in range(30)], axis=0)
    exact_curves = stacked(case.probe())
    small = exact_curves < np.median(exact_curves)  # where first order is right
    assert np.median(estimates[small] / exact_curves[small]) == pytest.approx(1, abs=0.05)


def test_what_has_no_adjoint_is_probed_and_said():
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 5] x) => (float[N, 6] y)
    <int64[4] pads = {0, 1, 0, 1}>
    { a = MatMul (x, w) t = Tanh (a) b = Pad <mode = "edge"> (t, pads) y = MatMul (b, v) }""")
    rng = np.random.default_rng(2)
    arrays = {"w": rng.standard_normal((5, 7), np.float32), "v": rng.standard_normal((9, 6), np.float32)}
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in arrays.items())
    case = Case(model, {"x": rng.standard_normal((6, 5), np.float32)})
    measured = measure_network(case.network, Config(), case.samples, RUNTIME, Progress())
    assert set(measured.probed) == {"a", "t", "x"}
    assert all("Pad" in reason for reason in measured.probed.values())
    exact_weights = case.probe().weights
    np.testing.assert_allclose(measured.curves.distortion[:7, :8], exact_weights[0], rtol=1e-3)
    np.testing.assert_allclose(measured.curves.distortion[7:13, 3:8], exact_weights[1][:, 3:], rtol=0.1)

"""Second moments of the output's gradient in a layer's weights: the quadratic form of its first-order curves."""

from dataclasses import replace

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.candidates.candidates import Candidates, LayerCandidates
from rdoq_onnx.candidates.moment_passes import collect
from rdoq_onnx.candidates.moments import Moments, blended
from rdoq_onnx.candidates.sensitivity import with_sensitivity
from rdoq_onnx.curves.taylor import first_order
from rdoq_onnx.model.codes import WeightCodes
from rdoq_onnx.system.threads import workers
from tests.cases import RUNTIME, Case, ignore

# name: (body, shape of a sample, shape of the weight); y has more than 16 elements, so that v is random signs
NETWORKS = {
    "few positions": ("z = Conv (x, w) y = Tanh (z)", (3, 4, 4), (11, 3, 3, 3)),
    "few channels": ("z = Conv <pads = [1, 1, 1, 1]> (x, w) y = Tanh (z)", (3, 6, 6), (2, 3, 3, 3)),
    "groups": ("z = Conv <group = 2> (x, w) y = Tanh (z)", (4, 6, 6), (6, 2, 3, 3)),
    "depthwise": ("z = Conv <group = 4> (x, w) y = Tanh (z)", (4, 6, 6), (4, 1, 3, 3)),
    "transposed": ("z = ConvTranspose <strides = [2, 2]> (x, w) y = Tanh (z)", (3, 4, 4), (3, 5, 2, 2)),
    "vectors": ("z = MatMul (x, w) y = Tanh (z)", (9, 5), (5, 4)),
    "used twice": ("a = MatMul (x, w) b = Tanh (a) z = MatMul (b, w) y = Tanh (z)", (9, 5), (5, 5)),
}


def network(name):
    body, sample, weight = NETWORKS[name]
    given, free = ", ".join(map(str, sample)), ", ".join("ABC"[: len(sample)])
    model = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, {given}] x) => (float[N, {free}] y) {{ {body} }}""")
    rng = np.random.default_rng(3)
    model.graph.initializer.append(numpy_helper.from_array(0.3 * rng.standard_normal(weight, np.float32), "w"))
    return Case(model, {"x": rng.standard_normal((6, *sample), np.float32)})


def sensitive(case, around=None):
    with workers(2) as pool:
        moments = collect(case.network, case.samples, case.batching.size, RUNTIME, pool, ignore)
        return with_sensitivity(case.plan(pool, seed=5, around=around), moments, ignore)


@pytest.mark.parametrize("name", NETWORKS)
def test_is_the_quadratic_form_of_the_curves(name):
    """Σ_j δ_j = ΔWᵀ F ΔW / D where all channels have the same rounding errors ΔW, with the same v."""
    case = network(name)
    (moments,) = sensitive(case)
    (layer,) = case.network.layers
    rows = layer.linear.rows(numpy_helper.to_array(case.network.model.graph.initializer[0]))
    error = np.random.default_rng(4).standard_normal(rows.shape[1]).astype(np.float32)
    zeros = np.zeros(rows.shape, np.int8)
    errors = WeightCodes(np.ones(rows.shape, np.int8), np.zeros(len(rows), np.float32))

    class Moved(WeightCodes):
        @property
        def values(self):
            return rows + error

    moved = Moved(zeros, errors.scales)
    candidates = Candidates((7,), (LayerCandidates(layer, moments.mean, ((moved,),)),), ())
    alone = replace(case.network, activations=())
    with workers(2) as pool:
        found = first_order(replace(case.plan(pool, seed=5), network=alone), candidates, ignore)
    per_group = layer.linear.grouped(np.broadcast_to(error, rows.shape))[:, 0].astype(np.float64)
    form = sum(d @ f @ d for d, f in zip(per_group, moments.sensitivity, strict=True))
    assert found.weights[0].sum() == pytest.approx(form / case.seen.metric.elements, rel=1e-4)


def test_one_position_a_sample_has_none():
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 5] x) => (float[N, 30] y) { y = MatMul (x, w) }""")
    rng = np.random.default_rng(3)
    model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal((5, 30), np.float32), "w"))
    (moments,) = sensitive(Case(model, {"x": rng.standard_normal((6, 5), np.float32)}))
    assert moments.sensitivity is None
    few = 0.5 * 5 / moments.vectors  # at least half as many as inputs for each vector
    assert 0.3 < few < 0.5
    assert [damping for _, damping in moments.variants()] == [few, few]


def test_a_layer_without_adjoint_keeps_its_covariance():
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 3, 6] x) => (float[N, 4, 7] y) {
        z = MatMul (x, w)  y = Pad <mode = "edge"> (z, pads)
    }""")
    rng = np.random.default_rng(3)
    arrays = {"w": rng.standard_normal((6, 7), np.float32), "pads": np.array([0, 1, 0, 0, 0, 0])}
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in arrays.items())
    (moments,) = sensitive(Case(model, {"x": rng.standard_normal((6, 3, 6), np.float32)}))
    assert moments.sensitivity is None


def test_blends_by_trace():
    one, other = np.diag([2.0, 4.0])[None], np.diag([10.0, 20.0])[None]
    np.testing.assert_allclose(blended(one, other, 0.25), one)  # equal up to scale
    np.testing.assert_allclose(blended(one, np.eye(2)[None], 0.5), np.diag([2.5, 3.5])[None])
    np.testing.assert_allclose(blended(np.zeros((1, 2, 2)), one, 0.5), one)  # no trace: the other as it is


def test_variants_mix_sensitivity_and_covariance():
    covariance, sensitivity = np.diag([1.0, 3.0])[None], np.diag([6.0, 2.0])[None]
    variants = Moments(np.zeros((1, 2)), covariance, sensitivity).variants()
    assert len(variants) == 3
    np.testing.assert_allclose(variants[1][0], np.diag([4.0, 4.0])[None])  # half of each
    np.testing.assert_allclose(variants[2][0], covariance)

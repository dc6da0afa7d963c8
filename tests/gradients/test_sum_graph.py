"""Sums inside the graph, as on a GPU, against the same sums in numpy; on the CPU, and on CUDA if available."""

import copy
from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from onnx import numpy_helper, parser

import rdoq_onnx
from rdoq_onnx.candidates import blocks
from rdoq_onnx.candidates.moment_passes import collect
from rdoq_onnx.candidates.sensitivity import with_sensitivity
from rdoq_onnx.curves import quantizer_sums
from rdoq_onnx.curves.taylor import first_order
from rdoq_onnx.errors import ShortageError
from rdoq_onnx.gradients import sum_graph
from rdoq_onnx.gradients.batch_sizes import with_memory
from rdoq_onnx.observation.batching import Batching
from rdoq_onnx.system.progress import Unfinished
from rdoq_onnx.system.runtime import Runtime, Session
from rdoq_onnx.system.threads import workers
from tests.cases import Case, ignore
from tests.conftest import ROOT
from tests.curves.test_shards import small_or_large
from tests.strategies import networks
from tests.system.test_runtime import needs_cuda
from tests.test_layer_forms import FORMS, feeds_of, model_of

MODELS = ROOT / "models"


class InGraph(Runtime):
    in_graph = True


HOST = Runtime("cpu", 2)
DEVICES = [pytest.param(InGraph("cpu", 2), id="cpu"), pytest.param(Runtime("cuda"), id="cuda", marks=needs_cuda)]


@pytest.fixture(autouse=True)
def _exact_sums_by_numpy(monkeypatch):
    """Avoid the histogram, whose bins round thresholds."""
    monkeypatch.setattr(quantizer_sums, "_BINNED", 10**9)


def measured(case, runtime, batch):
    """Moments with sensitivity, and curves."""
    with workers(2) as pool:
        plain = collect(case.network, case.samples, batch, runtime, pool, ignore)
        plan = case.plan(pool, batch, 3, runtime)
        sensed = with_sensitivity(plan, plain, ignore)
        curves = first_order(plan, case.candidates, ignore)
    return sensed, curves


def close(found, expected):
    scale = np.abs(expected).max(initial=1e-12)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-4 * scale)


def same(case, runtime, batch):
    (found, curves), (expected, exact) = measured(case, runtime, batch), measured(case, HOST, batch)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.mean, other.mean, rtol=1e-4, atol=1e-5)
        close(one.covariance, other.covariance)
        assert (one.sensitivity is None) == (other.sensitivity is None)
        if other.sensitivity is not None:
            close(one.sensitivity, other.sensitivity)
    assert curves.missing == exact.missing
    for one, other in zip(curves.weights, exact.weights, strict=True):
        close(one, other)
    for one, other in zip(curves.activations, exact.activations, strict=True):
        assert list(one) == list(other)
        for bits in other:
            close(one[bits], other[bits])


@pytest.mark.parametrize("runtime", DEVICES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_layer(form, runtime):
    model = model_of(form)
    case = Case(model, [feeds_of(model, seed) for seed in range(7)], widths=(0, 2, 4, 7))
    same(case, runtime, case.batching.size if not case.batching.stackable else 3)


@pytest.mark.parametrize("runtime", DEVICES)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=networks())
def test_random_networks(runtime, drawn):
    model, samples = drawn
    same(Case(model, samples, 9, widths=(0, 3, 7)), runtime, 4)


def network(body, sample, weights, count=6):
    """Build a case of a network from x to y with given or random weights."""
    model = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, {", ".join(map(str, sample))}] x) => (y) {{ {body} }}""")
    rng = np.random.default_rng(1)
    for name, shape in weights.items():
        value = rng.standard_normal(shape, np.float32) if isinstance(shape, tuple) else shape
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    return Case(inferred, {"x": rng.standard_normal((count, *sample), np.float32)}, widths=(0, 3, 7))


@pytest.mark.parametrize("attributes", ["group = 3", "strides = [2, 2]", "pads = [1, 0, 0, 0]"])
@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose"])
def test_kernels_of_one_tap(op_type, attributes):
    if (op_type, attributes[:4]) == ("ConvTranspose", "pads"):
        attributes = "output_padding = [1, 0], strides = [2, 1]"
    inputs = 1 if attributes.startswith("group") else 3
    case = network(f"y = {op_type} <{attributes}> (x, w)", (3, 4, 4), {"w": (3, inputs, 1, 1)})
    same(case, InGraph("cpu", 2), 4)


def test_wide_layers_in_parts_and_quantizers_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(blocks, "MOST_INPUTS", 10)
    monkeypatch.setattr(sum_graph, "_ROUNDED", 500)
    body = "z = Conv <group = 2> (x, w) a = Tanh (z) p = GlobalAveragePool (a) v = Flatten (p) y = Gemm (v, u)"
    same(network(body, (6, 5, 5), {"w": (24, 3, 2, 2), "u": (24, 18)}), InGraph("cpu", 2), 4)


def test_one_position_a_sample_and_what_has_no_adjoint():
    body = 'z = MatMul (x, w) t = Tanh (z) p = Pad <mode = "edge"> (t, pads) y = MatMul (p, v)'
    weights = {"w": (5, 7), "v": (9, 20), "pads": np.array([0, 1, 0, 1])}
    case = network(body, (5,), weights)
    same(case, InGraph("cpu", 2), 3)
    assert case.taylor().missing


def test_a_run_continues_where_another_ended():
    case = network("z = Conv (x, w) a = Relu (z) y = Conv (a, w)", (3, 6, 6), {"w": (3, 3, 2, 2)}, 40)

    class Kept(Unfinished):
        def __init__(self):
            self.values = []

        def get(self):
            return self.values[-1] if self.values else None

        def put(self, value):
            self.values.append(copy.deepcopy(value))

    def curves():
        done = []
        with workers(2) as pool:
            plan = case.plan(pool, 16, runtime=InGraph("cpu", 2))
            found = first_order(plan, case.candidates, done.append, kept)
        return found, done

    kept = Kept()
    whole, _ = curves()
    assert [[node for node, _ in v["nodes"]] for v in kept.values] == [[(0, 0)], [(1, 0)], [(2, 0)]]
    del kept.values[1:]
    rest, done = curves()
    assert done == [16, 16, 8]
    for one, other in zip(rest.weights, whole.weights, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("provider", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_the_same_bits_but_for_noise(provider, monkeypatch):
    def run(provider):
        return rdoq_onnx.quantize(
            MODELS / "digits_cnn.onnx",
            MODELS / "digits_calib.npz",
            weight_bits=4,
            activation_bits=8,
            effort="fast",
            samples=40,
            provider=provider,
            threads=2,
        )

    host = run("cpu")
    monkeypatch.setattr(Runtime, "in_graph", True)
    monkeypatch.setattr(Runtime, "memory", lambda self: 1 << 28)
    graph = run(provider)
    bits = [np.concatenate([x.bits for x in r.report.layers]) for r in (host, graph)]
    assert np.mean(bits[0] != bits[1]) < 0.05
    assert graph.report.predicted == pytest.approx(host.report.predicted, rel=0.02)


def test_a_large_network_with_tables(monkeypatch):
    model, samples, bits = small_or_large("large", monkeypatch)

    def run():
        return rdoq_onnx.quantize(model, samples, **bits, effort="fast", provider="cpu", threads=1).report

    host = run()
    monkeypatch.setattr(Runtime, "in_graph", True)
    monkeypatch.setattr(Runtime, "memory", lambda self: 1 << 28)
    graph = run()
    assert graph.predicted == pytest.approx(host.predicted, rel=0.02)
    found, expected = (np.concatenate([x.bits for x in r.layers]) for r in (graph, host))
    assert np.mean(found != expected) < 0.05


def test_a_batch_that_exceeds_memory_is_halved(monkeypatch):
    case = network("z = Conv (x, w) a = Relu (z) y = Conv (a, w)", (3, 6, 6), {"w": (3, 3, 2, 2)}, 40)
    whole, tried = Session.bound, []

    def bound(self, feeds, names=None):
        tried.append(len(feeds["x"]))
        if tried[-1] > 11:
            raise ShortageError("no memory")
        return whole(self, feeds, names)

    def curves(batch):
        with workers(2) as pool:
            return first_order(case.plan(pool, batch, runtime=InGraph("cpu", 2)), case.candidates, ignore)

    expected = curves(10)
    monkeypatch.setattr(Session, "bound", bound)
    found = with_memory(curves, 40, case.seen)
    assert tried == [40, 20, 10, 10, 10, 10]
    np.testing.assert_array_equal(found.weights[0], expected.weights[0])
    tried.clear()
    with pytest.raises(ShortageError):
        with_memory(curves, 40, replace(case.seen, batching=Batching(40, False)))  # the model's own size
    assert tried == [40]

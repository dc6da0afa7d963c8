"""The parametrized graph computes what the emitted model does."""

import numpy as np

from rdoq_onnx.emission.quantized_model import chosen_weights, quantized_model
from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.replace_weights import ReplaceWeights
from rdoq_onnx.reconstruction.parametrized import parametrized
from rdoq_onnx.reconstruction.variable_set import VariableSet
from tests.cases import RUNTIME


def spreads(graph):
    return dict.fromkeys(graph.biases, 1.0)


def test_it_computes_what_is_emitted(case):
    allocation = case.allocation
    graph = parametrized(allocation)
    variables = VariableSet.of(allocation, graph, spreads(graph))
    outputs = allocation.measurement.observation.metric.outputs
    feeds = next(case.split.measuring.batches(8))
    emitted = RUNTIME.session(with_outputs(quantized_model(allocation), outputs)).run(feeds)
    found = RUNTIME.session(graph.model).run({**feeds, **variables.feeds()}, outputs)
    for expected, value in zip(emitted, found, strict=True):
        noise = np.square(value - expected).mean() / np.square(expected).mean()
        assert noise < 1e-2  # biases are emitted as integers, and values halfway between two may round either way


def test_gates_leave_quantizers_out(digits):
    graph, gated = parametrized(digits.allocation), parametrized(digits.allocation, gated=True)
    assert len(gated.gates) == len(gated.scales)
    variables = VariableSet.of(digits.allocation, graph, spreads(graph)).feeds()
    feeds = next(digits.split.measuring.batches(8)) | variables
    (plain,) = RUNTIME.session(graph.model).run(feeds)
    session = RUNTIME.session(gated.model)
    opened, closed = (session.run(feeds | dict.fromkeys(gated.gates, np.full(1, g, np.float32)))[0] for g in (1, 0))
    np.testing.assert_allclose(opened, plain, rtol=1e-4, atol=1e-4)
    weights = [(w, w.linear.tensor(codes.values), shift) for w, codes, shift in chosen_weights(digits.allocation)]
    floats = run_passes([ReplaceWeights(weights)], digits.allocation.measurement.aimed.model, checked=False)
    (exact,) = RUNTIME.session(floats).run({name: feeds[name] for name in feeds.keys() - variables.keys()})
    np.testing.assert_allclose(closed, exact, rtol=1e-4, atol=1e-4)


def test_all_weights_and_quantizers_are_inputs(case):
    allocation = case.allocation
    graph = parametrized(allocation)
    network = allocation.measurement.network
    assert list(graph.sites) == list(range(len(network.searched)))
    assert len(graph.scales) == len(network.activations)
    assert set(graph.inputs) <= {i.name for i in graph.model.graph.input}
    assert len(set(graph.inputs)) == len(graph.inputs)
    constants = {t.name for t in graph.model.graph.initializer}
    assert not constants.intersection(graph.inputs)


def test_a_tied_table_is_an_input_beside_its_layer(case):
    network = case.allocation.measurement.network
    sites = parametrized(case.allocation).sites
    names = {layer.name: k for k, layer in enumerate(network.layers)}
    for tie in network.ties:
        assert [site.linear.op_type for site in sites[names[tie.layer]]] == ["MatMul", "Gather"]


def test_each_convolution_has_a_bias(digits):
    graph = parametrized(digits.allocation)
    layers = digits.allocation.measurement.network.layers
    assert list(graph.biases) == list(range(len(layers)))
    for k, (_, value) in graph.biases.items():
        assert value.size == layers[k].linear.channels


def test_the_network_stays_as_it_is(digits):
    model = digits.allocation.measurement.network.model
    before = model.SerializeToString()
    parametrized(digits.allocation)
    assert model.SerializeToString() == before

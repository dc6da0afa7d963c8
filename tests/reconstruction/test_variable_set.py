"""All variables of an allocation: back and forth."""

import numpy as np
import pytest

from rdoq_onnx.reconstruction.parametrized import parametrized
from rdoq_onnx.reconstruction.variable_set import VariableSet


@pytest.fixture
def variables(case):
    graph = parametrized(case.allocation)
    return VariableSet.of(case.allocation, graph, dict.fromkeys(graph.biases, 1.0))


def test_untouched_variables_are_the_allocation(case, variables):
    assert case.judge.distortion(variables.tuned()) == pytest.approx(case.judge.distortion(case.allocation), rel=1e-4)


def test_widths_and_budgets_stay(case, variables):
    rng = np.random.default_rng(0)
    for kind, array in variables.arrays:
        array += (0.8 if kind == "codes" else 0.05) * rng.standard_normal(array.shape).astype(np.float32)
    variables.confine()
    found = variables.tuned()
    assert found.activation_bits == case.allocation.activation_bits
    pairs = zip(found.measurement.layers, found.layer_bits, case.allocation.layer_bits, strict=True)
    changed = 0
    for k, (layer, bits, before) in enumerate(pairs):
        np.testing.assert_array_equal(bits, before)
        for width in np.unique(bits).tolist():
            integers = layer.codes[width].integers[bits == width].astype(int)
            assert (integers.max(axis=1) - integers.min(axis=1) < 1 << width).all()
            old = case.allocation.measurement.layers[k].codes[width].integers
            changed += int((integers != old[bits == width]).sum())
    assert changed
    assert np.isfinite(case.judge.distortion(found))


def test_values_are_restored(variables):
    before = variables.values()
    for _, array in variables.arrays:
        array += 1
    variables.restore(before)
    for (_, array), value in zip(variables.arrays, before, strict=True):
        np.testing.assert_array_equal(array, value)


def test_a_changed_bias_is_emitted(digits):
    graph = parametrized(digits.allocation)
    variables = VariableSet.of(digits.allocation, graph, dict.fromkeys(graph.biases, 1.0))
    last = max(variables.biases)
    variables.biases[last].beta[:] = 100
    assert digits.judge.distortion(variables.tuned()) == pytest.approx(100**2, rel=0.1)

"""Sums per channel, whatever axes the channels lie on."""

from dataclasses import astuple

import numpy as np
import pytest
from onnx import numpy_helper, parser

from rdoq_onnx.candidates.channel_sums import ChannelSums, measure
from rdoq_onnx.candidates.scale_groups import find_groups
from rdoq_onnx.observation.shapes import shapes_of
from rdoq_onnx.system.threads import workers
from tests.cases import RUNTIME, Case


def sums(values, gradient, labels, channels):
    result = ChannelSums.of(channels)
    for half in (slice(0, 1), slice(1, None)):
        result.add(values[half], gradient[half], labels)
    return result


def test_sums_over_all_elements_of_a_channel():
    rng = np.random.default_rng(0)
    values, gradient = rng.standard_normal((2, 2, 3, 5, 4), np.float32)
    found = sums(values, gradient, np.arange(3).reshape(3, 1, 1), 3)
    axes = (0, 2, 3)
    np.testing.assert_allclose(found.low, np.minimum(values.min(axes), 0))
    np.testing.assert_allclose(found.high, np.maximum(values.max(axes), 0))
    np.testing.assert_allclose(found.power, np.square(values.astype(float)).mean(axes), rtol=1e-6)
    np.testing.assert_allclose(found.sensitivity, np.square(gradient.astype(float)).sum(axes), rtol=1e-6)


def test_channels_of_several_axes_and_elements_of_none():
    values = np.arange(1.0, 13).reshape(1, 2, 3, 2)  # two heads of two channels
    found = sums(values, values, np.array([[[0, 1]], [[2, -1]]]), 3)
    np.testing.assert_array_equal(found.high, [5, 6, 11])
    np.testing.assert_array_equal(found.elements, [3, 3, 3])


def test_tensors_without_elements_add_nothing():
    found = ChannelSums.of(2)
    found.add(np.zeros((0, 2)), np.zeros((0, 2)), np.arange(2))
    assert not found.elements.any()


@pytest.mark.parametrize("batch", [3, 4, 6])
def test_samples_that_fill_the_last_batch_do_not_count(batch):
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 3, 6, 6] x) => (float[N, 4, 2, 2] y) { z = Conv (x, w) a = Relu (z) y = Conv (a, u) }""")
    rng = np.random.default_rng(0)
    for name, shape in (("w", (4, 3, 3, 3)), ("u", (4, 4, 3, 3))):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape, np.float32), name))
    case = Case(model, {"x": rng.standard_normal((5, 3, 6, 6), np.float32)}, widths=(4,))
    groups = find_groups(case.network, shapes_of(case.network.model, case.samples, RUNTIME))
    assert groups
    with workers(2) as pool:
        one, other = (measure(groups, case.plan(pool, size)) for size in (5, batch))
    assert one.runs == other.runs
    for name, sums in one.tensors.items():
        np.testing.assert_allclose(astuple(other.tensors[name]), astuple(sums), rtol=1e-5)
    for name, squares in one.layers.items():
        np.testing.assert_allclose(other.layers[name], squares, rtol=1e-5)

"""Sums per channel, whatever axes the channels lie on."""

import numpy as np

from rdoq_onnx.candidates.channel_sums import ChannelSums


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

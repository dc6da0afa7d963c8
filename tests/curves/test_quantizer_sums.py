"""⟨g, Q(a) - a⟩ of many quantizers from one histogram, against direct evaluation."""

import numpy as np
import pytest

from rdoq_onnx.candidates.activations import affine_candidates
from rdoq_onnx.curves.quantizer_sums import Staircases


@pytest.mark.parametrize("size", [500, 70_000])
@pytest.mark.parametrize("least", [0.0, -1.3])
def test_one_histogram_serves_all_quantizers(size, least):
    """Values in the bin of a threshold may be rounded either way: they are few, and their errors random."""
    rng = np.random.default_rng(size)
    a = np.maximum(rng.standard_normal(size, np.float32), np.float32(least))
    g = rng.standard_normal((2, size), np.float32)
    quantizers = [q for bits in range(1, 9) for q in affine_candidates(least, float(a.max()), bits)]
    expected = np.stack([g @ (q(a) - a) for q in quantizers], axis=1)
    found = Staircases.of(quantizers).products(a, g)
    noise = np.sqrt([np.square(q(a) - a).sum() for q in quantizers])
    assert np.abs((found - expected) / noise).mean() < 0.2
    few = np.array([q.bits <= 3 for q in quantizers])
    np.testing.assert_allclose(found[:, few], expected[:, few], atol=0.2 * noise[few].max())
    assert np.square(found).sum() == pytest.approx(np.square(expected).sum(), rel=0.05)


def test_a_constant_activation_has_a_histogram():
    a, g = np.full(5000, 0.37, np.float32), np.ones((1, 5000), np.float32)
    quantizers = affine_candidates(0.0, 1.0, 2)
    expected = [(q(a) - a).sum() for q in quantizers]
    np.testing.assert_allclose(Staircases.of(quantizers).products(a, g)[0], expected, rtol=1e-3)

"""Random inputs: images with the statistics of photographs, integers within their ranges, the same for one seed."""

import numpy as np
import pytest

from rdoq_onnx.calibration.load import synthetic
from rdoq_onnx.errors import ModelError
from tests.calibration.test_load import SILERO, X, spec


@pytest.mark.parametrize(
    ("shape", "made"),
    [
        ((None, 3, 32, 40), (4, 3, 32, 40)),
        ((None, 1, None, None), (4, 1, 224, 224)),
        ((1, 16, 8, 3), (4, 16, 8, 3)),
    ],
)
def test_synthetic_images(shape, made):
    images = synthetic([spec("x", *shape)], 4, 0).arrays["x"]
    assert images.shape == made
    assert images.dtype == np.float32
    axis = 1 if made[1] in (1, 3) else 3
    others = tuple(k for k in range(4) if k != axis)
    np.testing.assert_allclose(images.mean(others, np.float64), 0, atol=1e-5)
    np.testing.assert_allclose(images.std(others, np.float64), 1, atol=1e-5)


def test_synthetic_images_look_natural():
    images = synthetic([spec("x", None, 3, 128, 128)], 16, 0).arrays["x"]
    assert np.corrcoef(images.transpose(1, 0, 2, 3).reshape(3, -1)).min() > 0.7
    power = (np.abs(np.fft.fft2(images)) ** 2).mean((0, 1))[0, 1:60]
    slope = np.polyfit(np.log(np.arange(1, 60)), np.log(power), 1)[0]
    assert -3 < slope < -1.5
    derivative = np.diff(images[:, 0]).ravel()
    assert (derivative**4).mean() / (derivative**2).mean() ** 2 > 6  # edges: heavy-tailed; a Gaussian has 3


def test_synthetic_others():
    specs = [
        spec("f", None, 3, 4, 4),
        spec("h", None, 2, None, dtype="float16"),
        spec("i", None, 500, dtype="int32"),
        spec("j", None, 500, dtype="uint8"),
        spec("b", None, 500, dtype="bool"),
        spec("k", None, 9, dtype="int8"),
    ]
    made = synthetic(specs, 6, 3, {"i": 10, "k": 1000})
    assert made.source == "synthetic"
    arrays = made.arrays
    assert [arrays[n].shape for n in "fhij"] == [(6, 3, 4, 4), (6, 2, 16), (6, 500), (6, 500)]
    assert [arrays[s.name].dtype for s in specs] == [s.dtype for s in specs]
    assert set(arrays["i"].flat) == set(range(10))
    assert set(arrays["j"].flat) == {0, 1}
    assert set(arrays["b"].flat) == {False, True}
    assert arrays["k"].min() >= 0


def test_synthetic_is_deterministic_and_independent():
    specs = [X, spec("z", None, 3), spec("image", None, 3, 16, 16)]
    first, again, other = (synthetic(specs, 5, seed) for seed in (0, 0, 1))
    assert first.digest == again.digest != other.digest
    assert not np.array_equal(first.arrays["x"], first.arrays["z"])


def test_synthetic_batches():
    assert len(synthetic([spec("x", 4, 3)], 6, 0)) == 8
    made = synthetic(SILERO, 5, 0)
    assert set(made.constants) == {"state", "sr"}
    assert made.constants["state"].shape == (2, 1, 4)
    assert (len(made), made.batch) == (5, 1)
    with pytest.raises(ModelError, match="no input with samples"):
        synthetic([spec("sr", dtype="int64")], 5, 0)

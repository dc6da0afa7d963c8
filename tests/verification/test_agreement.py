"""Two correct kernels may differ by rounding; a kernel that computes something else is detected."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rdoq_onnx.errors import VerificationError
from rdoq_onnx.verification.agreement import BASIC, DEFAULT, OPENVINO, check_agreement


def check(default, basic, gap=0.0, signal=1000.0, **others):
    """Powers of one sample, or of several."""
    powers = [np.atleast_1d(np.asarray(x, np.float64)) for x in (signal, default, basic, gap)]
    elsewhere = {where.replace("_", " "): np.atleast_1d(np.asarray(x, np.float64)) for where, x in others.items()}
    check_agreement(powers[0], {DEFAULT: powers[1], BASIC: powers[2], **elsewhere}, powers[3])


def rounded(seed, samples, elements, common=0.0, fault=0.0):
    """Powers of two kernels' errors around one network, as check() takes them; `fault` is in the default level."""
    random = np.random.default_rng(seed)
    shared = common * random.normal(size=(samples, elements))
    default, basic = (shared + random.normal(size=(samples, elements)) for _ in range(2))
    default += fault * random.normal(size=(samples, elements))
    default, basic, gap = ((x**2).sum(axis=1) for x in (default, basic, default - basic))
    return {"default": default, "basic": basic, "gap": gap, "signal": np.full(samples, 100.0 * elements)}


def test_levels_that_disagree():
    message = r"at its default level: distortion 9 between them, 3 and 2.5 from the float model"
    with pytest.raises(VerificationError, match=message):
        check(3.0, 2.5, 9.0)
    with pytest.raises(VerificationError, match=r"has 17.0 dB at one thread, 30.0 dB at ONNX Runtime's BASIC"):
        check(1.0, 1.0, two=1.0, one_thread=20.0)
    with pytest.raises(VerificationError, match=r"has 20.0 dB at ONNX Runtime's BASIC level, 30.0 dB at .* default"):
        check(1.0, 10.0, 11.0)
    with pytest.raises(VerificationError, match="at OpenVINO"):
        check(1.0, 1.0, **{OPENVINO: 3.2})
    check(1.0, 1.0, two=1.2, **{OPENVINO: 2.8})
    check(0.005, 0.001, 0.005)  # 50 dB


@pytest.mark.parametrize(("noise", "gap"), [(3.0, 0.5), (3.0, 4.0), (0.0, 0.0), (1e-12, 1e-10)])
def test_rounding_differences_between_levels_pass(noise, gap):
    check(noise, noise, gap)


@given(st.integers(0, 2**32), st.integers(4, 40), st.integers(50, 200), st.floats(0, 3))
def test_two_correct_kernels_that_round_differently(seed, samples, elements, common):
    check(**rounded(seed, samples, elements, common))


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(50, 200), st.floats(0, 1))
def test_a_kernel_with_a_fault(seed, samples, elements, common):
    with pytest.raises(VerificationError, match="at ONNX Runtime's default level"):
        check(**rounded(seed, samples, elements, common, fault=3.0))


def test_one_sample_that_outweighs_the_others_proves_nothing():
    """Two classes, of which a Softmax is unsure in one sample: held-out samples of the zoo's ppocr_cls at 8 bits."""
    one = {"default": [1e-8, 5.0e-4, 5e-6, 1e-9], "basic": [1e-8, 2.7e-3, 8e-6, 1e-9], "gap": [0, 8.9e-4, 1e-7, 0]}
    check(**one, signal=[1.0] * 4)


def test_one_sample_of_many_that_a_kernel_breaks():
    with pytest.raises(VerificationError, match="at ONNX Runtime's default level"):
        check([1e-3] * 23 + [1.0], [1e-3] * 24, [1e-4] * 23 + [1.0], [1.0] * 24)


@pytest.mark.parametrize("where", [DEFAULT, BASIC])
def test_a_run_that_is_not_finite(where):
    noises = {DEFAULT: np.ones(2), BASIC: np.ones(2), where: np.array([1.0, np.nan])}
    with pytest.raises(VerificationError, match=f"not finite at {where}"):
        check_agreement(np.ones(2), noises, np.ones(2))

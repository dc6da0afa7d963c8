"""One-sided 95 % bounds: what few samples prove.

A share, k of n samples that agree (Clopper and Pearson 1934): the least p with P(K ≥ k | n, p) ≥ 5 %. Without a miss it
is 0.05^(1/n), so 299 samples prove 99 %.

An SQNR, a ratio of sums R = ΣS / ΣN over samples: the delta method on log R, whose variance is that of the influences
S_i / ΣS - N_i / ΣN, with Student's t for n - 1 degrees of freedom.
"""

import math

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.observation.distortion import sqnr_db

LEVEL = 0.95
_Z = 1.6448536269514722  # the normal quantile of LEVEL
_T = {
    1: 6.314,
    2: 2.920,
    3: 2.353,
    4: 2.132,
    5: 2.015,
    6: 1.943,
}  # Student's, where the expansion below is not good enough
_DECIBELS = 10 / math.log(10)

Float = NDArray[np.float64]


def share_bound(hits: int, samples: int) -> float:
    """Return the lower bound of the share behind `hits` of `samples`, 0 without a sample."""
    if not hits:
        return 0.0
    low, high = 0.0, hits / samples
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _tail(hits, samples, middle) < 1 - LEVEL else (low, middle)
    return low


def share_needed(share: float) -> int | None:
    """Return how many samples without a miss prove `share`; None if no number does."""
    return None if share >= 1 else max(1, math.ceil(math.log(1 - LEVEL) / math.log(share) - 1e-9)) if share > 0 else 1


def sqnr_bound(signal: Float, noise: Float) -> float:
    """Return the lower bound in dB of the SQNR behind signal and noise powers per sample; -inf for one sample."""
    spread = sqnr_error(signal, noise)
    if not spread:
        return _sqnr(signal, noise)
    return _sqnr(signal, noise) - student(len(signal) - 1) * spread if len(signal) > 1 else -math.inf


def sqnr_error(signal: Float, noise: Float) -> float:
    """Return the standard error in dB of the SQNR; 0 without noise, infinite for one sample."""
    if noise.sum() <= 0 or signal.sum() <= 0:
        return 0.0
    count = len(signal)
    influence = signal / signal.sum() - noise / noise.sum()
    return _DECIBELS * math.sqrt(count / (count - 1) * float(np.square(influence).sum())) if count > 1 else math.inf


def sqnr_needed(signal: Float, noise: Float, least: float) -> int | None:
    """Return about how many samples prove `least` dB if others are like these; None if these miss it or are one."""
    margin, spread = _sqnr(signal, noise) - least, sqnr_error(signal, noise)
    if len(signal) < 2 or margin <= 0 or not math.isfinite(spread):
        return None
    return max(2, math.ceil(len(signal) * (student(len(signal) - 1) * spread / margin) ** 2))


def student(freedom: int) -> float:
    """Return the 95 % quantile of Student's t (Cornish and Fisher's expansion in 1 / freedom)."""
    if freedom in _T:
        return _T[freedom]
    z, n = _Z, freedom
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / n + second / n**2


def _sqnr(signal: Float, noise: Float) -> float:
    return sqnr_db(float(signal.sum()), float(noise.sum()))


def _tail(hits: int, samples: int, share: float) -> float:
    """P(K ≥ hits) of a binomial distribution."""
    if share <= 0:
        return 0.0
    k = np.arange(hits, samples + 1)
    ways = [math.lgamma(samples + 1) - math.lgamma(i + 1) - math.lgamma(samples - i + 1) for i in k]
    logs = np.array(ways) + k * math.log(share) + (samples - k) * math.log1p(-share)
    return float(np.exp(logs).sum())

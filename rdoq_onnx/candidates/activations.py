"""Activation quantizers: scale and zero point of a range, and the candidate ranges.

HardSwish is 0 up to -3. A quantizer of what it reads therefore saturates there without loss, and with scale 3 / z and
zero point z its integers q turn into those of x + 3 by another zero point (passes/integer_hard_swish.py).
"""

import numpy as np

from rdoq_onnx.candidates.quantizer import TINY
from rdoq_onnx.model.codes import Affine

# Shares of a tensor's range that candidates span, by bits: (tightest, widest).
_CLIPS = {1: (0.05, 0.5), 2: (0.1, 0.6), 3: (0.14, 0.8), 4: (0.2, 1.0), 5: (0.25, 1.0), 6: (0.3, 1.0), 7: (0.35, 1.0)}
_CLIPS[8] = (0.4, 1.0)
_CLIPS_TRIED = 8
_TINY = 0.02  # the same for probabilities, most of which are tiny, at any width
_COARSE = 5  # bits up to which rounding costs so much that clipping pays off even if the range is uncertain
_LEAST_ORIGIN = 8  # zero point below which a scale that divides 3 may be coarser by more than an eighth
_REFINEMENTS = (0.82, 0.91, 1.1, 1.21)


def affine(low: float, high: float, bits: int, symmetric: bool = False) -> Affine:
    """Return the quantizer of `bits` bits for the range low..high, which clips values beyond it.

    Zero is exact. A range without negative values uses every integer for positive ones. A range of zero alone becomes
    0..1: with a tiny scale, the next layer's bias would not fit INT32.
    symmetric: signed integers with a zero point of 0; at 8 bits a positive range then has 127 levels above 0.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    high = 1.0 if low == high else high
    if symmetric:
        least, greatest = (0, min((1 << bits) - 1, 127)) if low == 0 else (-(1 << bits - 1), (1 << bits - 1) - 1)
        reach = max(high / max(greatest, 1), low / least if least else 0.0)
        return Affine(float(np.float32(max(reach, TINY * 2**20))), 0, least, greatest, signed=True)
    levels = (1 << bits) - 1
    scale = float(np.float32(max((high - low) / levels, TINY * 2**20)))
    return Affine(scale, int(np.clip(np.rint(-low / scale), 0, levels)), 0, levels)


def affine_candidates(
    low: float, high: float, bits: int, symmetric: bool = False, uncertain: bool = False, probability: bool = False
) -> list[Affine]:
    """Return quantizers of `bits` bits for a tensor of range low..high, from the whole range to a tight clip.

    Fewer bits try tighter clips. uncertain: the range comes from few samples; above 5 bits it is then not clipped.
    probability: the values come from a Softmax.
    """
    if uncertain and bits > _COARSE:
        return [affine(low, high, bits, symmetric)]
    tightest, widest = _CLIPS[bits]
    shares = np.geomspace(_TINY if probability else tightest, widest, _CLIPS_TRIED)[::-1]
    return list(dict.fromkeys(affine(low * share, high * share, bits, symmetric) for share in shares))


def hard_swish_candidates(high: float, uncertain: bool = False) -> list[Affine]:
    """Return quantizers of 8 bits for what a HardSwish reads, whose greatest value is `high`; else as above."""
    tightest, widest = _CLIPS[8]
    shares = [1.0] if uncertain else np.geomspace(tightest, widest, _CLIPS_TRIED)[::-1]
    return list(dict.fromkeys(_saturating(high * share) for share in shares))


def saturates_for_hard_swish(scale: float, zero_point: int) -> bool:
    """Whether a quantizer with these numbers begins at -3, in steps of a whole part of 3."""
    return zero_point > 0 and np.float32(scale) == np.float32(3 / zero_point)


def _saturating(high: float) -> Affine:
    """Return the quantizer from -3 to `high`, or little more where its scale has to divide 3."""
    zero_point = int(3 * 255 / (3 + max(high, 0.0)))
    if zero_point < _LEAST_ORIGIN:
        return affine(-3.0, high, 8)
    return Affine(float(np.float32(3 / zero_point)), zero_point, 0, 255)


def refined(quantizer: Affine, least: float, greatest: float) -> list[Affine]:
    """Return `quantizer` and others of its width, with either end of the range moved slightly inward or outward.

    No range exceeds the tensor's, least..greatest: the quantizer would no longer imply a Relu6.
    """
    low, high = quantizer.range
    if quantizer.high == 255 and saturates_for_hard_swish(quantizer.scale, quantizer.zero_point):
        return list(dict.fromkeys([quantizer, *(_saturating(min(high * f, greatest)) for f in _REFINEMENTS)]))
    sides = [(1.0, f) for f in _REFINEMENTS] + ([(f, 1.0) for f in _REFINEMENTS] if low < 0 else [])
    ends = [(max(low * a, least), min(high * b, greatest)) for a, b in sides]
    return list(dict.fromkeys([quantizer, *(affine(*end, quantizer.bits, quantizer.signed) for end in ends)]))

"""Quantizers of activations: scale and zero point for a range, and the ranges tried."""

import numpy as np

from rdoq_onnx.candidates.quantizer import TINY
from rdoq_onnx.model.codes import Affine

# The same for a tensor's range, by bits: (tightest, widest).
_CLIPS = {1: (0.05, 0.5), 2: (0.1, 0.6), 3: (0.14, 0.8), 4: (0.2, 1.0), 5: (0.25, 1.0), 6: (0.3, 1.0), 7: (0.35, 1.0)}
_CLIPS[8] = (0.4, 1.0)
_CLIPS_TRIED = 8
_COARSE = 5  # bits up to which rounding costs so much that clipping pays even where the ends of a range are uncertain
_REFINEMENTS = (0.82, 0.91, 1.1, 1.21)


def affine(low: float, high: float, bits: int, symmetric: bool = False) -> Affine:
    """The quantizer of `bits` bits for values from low to high, which clips the others.

    Zero is represented exactly; a range without negative values uses every integer for the positive ones;
    one of zero alone is taken as 0 to 1, since with a tiny scale the next layer's bias would not fit into INT32.
    symmetric: signed integers and a zero point of 0; at 8 bits, positive values then have 127 of them.
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
    low: float, high: float, bits: int, symmetric: bool = False, uncertain: bool = False
) -> list[Affine]:
    """Quantizers of `bits` bits for a tensor that spans low..high, from the whole range to a tight clip.

    The fewer the bits, the tighter the clips that are tried. uncertain: few samples have shown the range; over 5 bits
    it is then taken whole.
    """
    if uncertain and bits > _COARSE:
        return [affine(low, high, bits, symmetric)]
    shares = np.geomspace(*_CLIPS[bits], _CLIPS_TRIED)[::-1]
    return list(dict.fromkeys(affine(low * share, high * share, bits, symmetric) for share in shares))


def refined(quantizer: Affine, least: float, greatest: float) -> list[Affine]:
    """`quantizer`, and others of its width whose range ends a little further in or out, on either side.

    No range goes beyond least..greatest, those of the tensor: a Relu6 would then no longer be implied.
    """
    low, high = quantizer.range
    sides = [(1.0, f) for f in _REFINEMENTS] + ([(f, 1.0) for f in _REFINEMENTS] if low < 0 else [])
    ends = [(max(low * a, least), min(high * b, greatest)) for a, b in sides]
    return list(dict.fromkeys([quantizer, *(affine(*end, quantizer.bits, quantizer.signed) for end in ends)]))

"""Check from their errors on the same samples whether the kernels that run a file agree.

Two correct kernels round ties differently, and deep networks amplify each difference: a = y + e + r and b = y + e + s,
where y is the float network, e the common error, r and s independent and of the same power ρ. In the mean

    ‖a - y‖² = ‖b - y‖² = ‖e‖² + ρ,    ‖a - b‖² = 2 ρ ≤ ‖a - y‖² + ‖b - y‖².

So the two may differ by twice the error of either. A fault in one kernel adds its power to that kernel's error, and the
errors are out of proportion. Faults in both put their errors on opposite sides of y: the difference is then well beyond
both errors together.

The relative standard error of a sum over n samples is √(n / (n - 1) Σ(x - mean)²) / Σx; one sample that outweighs the
others makes the sum useless. Two standard errors are allowed, none if there is a single sample.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.errors import VerificationError
from rdoq_onnx.observation.distortion import sqnr_db

BASIC = "ONNX Runtime's BASIC level"
DEFAULT = "ONNX Runtime's default level"
OPENVINO = "OpenVINO"
_PROPORTION = 1.5
_RUNTIMES = 3.0  # another runtime rounds ties in its own way
_NEGLIGIBLE = 1e-5  # share of the signal, 50 dB: less noise is never a fault
_SURE = 2.0  # standard errors

Powers = NDArray[np.float64]


def check_agreement(signal: Powers, noises: Mapping[str, Powers], gap: Powers, part: str = "") -> None:
    """Raise VerificationError unless the BASIC level, the default level and other runs compute the same network.

    Powers per sample, [samples]: of the float outputs, of the errors by run, and of the difference between the two
    levels. part: the part of the outputs that they are of, "" if there is one.
    """
    what = f"part {part!r} of the emitted model" if part else "the emitted model"
    broken = next((where for where, noise in noises.items() if not np.isfinite(noise).all()), None)
    if broken is not None:
        raise VerificationError(f"the outputs of the emitted model are not finite at {broken}")
    floor = _NEGLIGIBLE * signal.sum()
    plain, default = noises[BASIC], noises[DEFAULT]
    for where, noise in noises.items():
        other = DEFAULT if where == BASIC else BASIC
        if _beyond(noise, noises[other], _RUNTIMES if where == OPENVINO else _PROPORTION, floor):
            raise VerificationError(
                f"{what} has {sqnr_db(signal.sum(), noise.sum()):.1f} dB at {where}, "
                f"{sqnr_db(signal.sum(), noises[other].sum()):.1f} dB at {other}"
            )
    excess = gap - _PROPORTION * (default + plain)
    if excess.sum() - _SURE * _standard_error(excess) > floor:
        raise VerificationError(
            f"the outputs at {BASIC} differ from those at its default level: distortion "
            f"{gap.mean():.3g} between them, {default.mean():.3g} and {plain.mean():.3g} from the float model"
        )


def _beyond(noise: Powers, other: Powers, ratio: float, floor: float) -> bool:
    """Tell whether `noise` exceeds `ratio` times `other` by more than the standard errors of both explain."""
    if noise.sum() <= floor:
        return False
    shares = [_standard_error(x) / x.sum() for x in (noise, other) if x.sum() > 0]
    uncertainty = float(np.exp(_SURE * np.hypot.reduce(shares)))
    return bool(noise.sum() > uncertainty * ratio * other.sum() + floor)


def _standard_error(values: Powers) -> float:
    """Return the standard error of the sum of `values`."""
    count = len(values)
    return float(values.std(ddof=1) * count**0.5) if count > 1 else 0.0

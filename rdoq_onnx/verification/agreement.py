"""Whether the kernels that run one file agree, told by their errors on the same samples.

Two correct kernels round ties differently, and deep networks carry each difference on: a = y + e + r and b = y + e + s,
where y is the float network, e what both have in common, r and s of the same power ρ and independent. In the mean

    ‖a - y‖² = ‖b - y‖² = ‖e‖² + ρ,    ‖a - b‖² = 2 ρ ≤ ‖a - y‖² + ‖b - y‖².

So the distance between the two may be twice what either is off by. A fault of one adds its power to that one's error
and shows as errors out of proportion. Faults of both show as errors that lie on opposite sides of y: the distance is
then well beyond both errors together.

A sum over n samples is off by a share of √(n / (n - 1) Σ(x - mean)²) / Σx, its standard error; one sample that
outweighs the others makes it useless. Two of these are allowed, none where there is one sample.
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
_RUNTIMES = 3.0  # another runtime rounds ties of its own
_INAUDIBLE = 1e-5  # share of the signal, 50 dB: noise under that is no fault
_SURE = 2.0  # standard errors

Powers = NDArray[np.float64]


def check_agreement(signal: Powers, noises: Mapping[str, Powers], gap: Powers) -> None:
    """Raise VerificationError unless what ran at the BASIC level, at the default level and elsewhere is one network.

    Powers of each sample, [samples]: of the float outputs, of the errors by where they were made, and of the difference
    between the two levels.
    """
    broken = next((where for where, noise in noises.items() if not np.isfinite(noise).all()), None)
    if broken is not None:
        raise VerificationError(f"the emitted model gives outputs that are not finite at {broken}")
    floor = _INAUDIBLE * signal.sum()
    plain, default = noises[BASIC], noises[DEFAULT]
    for where, noise in noises.items():
        other = DEFAULT if where == BASIC else BASIC
        if _beyond(noise, noises[other], _RUNTIMES if where == OPENVINO else _PROPORTION, floor):
            raise VerificationError(
                f"the emitted model has {sqnr_db(signal.sum(), noise.sum()):.1f} dB at {where}, "
                f"{sqnr_db(signal.sum(), noises[other].sum()):.1f} dB at {other}"
            )
    excess = gap - _PROPORTION * (default + plain)
    if excess.sum() - _SURE * _standard_error(excess) > floor:
        raise VerificationError(
            f"the emitted model gives other numbers at {BASIC} than at its default level: distortion {gap.mean():.3g} "
            f"between them, {default.mean():.3g} and {plain.mean():.3g} from the float model"
        )


def _beyond(noise: Powers, other: Powers, ratio: float, floor: float) -> bool:
    """Whether `noise` is out of proportion to `other`, whose ratio is known up to a factor of its standard errors."""
    if noise.sum() <= floor:
        return False
    shares = [_standard_error(x) / x.sum() for x in (noise, other) if x.sum() > 0]
    unsure = float(np.exp(_SURE * np.hypot.reduce(shares)))
    return bool(noise.sum() > unsure * ratio * other.sum() + floor)


def _standard_error(values: Powers) -> float:
    """Of the sum of `values`."""
    count = len(values)
    return float(values.std(ddof=1) * count**0.5) if count > 1 else 0.0

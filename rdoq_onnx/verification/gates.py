"""Gates: what an emitted model must keep to be written."""

import math

from rdoq_onnx.emission.emit import Emission
from rdoq_onnx.errors import VerificationError
from rdoq_onnx.model.sizes import model_bytes
from rdoq_onnx.observation.confidence import sqnr_needed
from rdoq_onnx.verification.part_figures import PartFigures
from rdoq_onnx.verification.verify import Verification


def missed_gate(
    emission: Emission, verification: Verification, min_sqnr: float | None, max_bytes: int | None
) -> VerificationError | None:
    """Return the error if the file exceeds `max_bytes`, or its SQNR does not prove to be `min_sqnr` dB.

    The worst part decides, by the one-sided 95 % bound of its SQNR.
    """
    size = model_bytes(emission.model)
    if max_bytes is not None and size > max_bytes:
        return VerificationError(f"--max-bytes {max_bytes}: the emitted model has {size} bytes; give fewer bits")
    if min_sqnr is None:
        return None
    missed = f"--min-sqnr {min_sqnr:g}: "
    worst = verification.worst
    if worst.sqnr_db < min_sqnr:
        return VerificationError(
            f"{missed}the emitted model has {worst.sqnr_db:.2f} dB{_where(verification, worst)}; give more bits"
        )
    least = min(verification.parts, key=lambda part: part.bound_db)
    if least.bound_db >= min_sqnr:
        return None
    bound = f"only {least.bound_db:.2f} dB (95 %)" if math.isfinite(least.bound_db) else "nothing"
    return VerificationError(
        f"{missed}{verification.samples} samples of {least.sqnr_db:.2f} dB{_where(verification, least)} prove {bound}; "
        f"{_fix(verification, least, min_sqnr)}"
    )


def _where(verification: Verification, part: PartFigures) -> str:
    return f" in part {part.name!r}" if len(verification.parts) > 1 else ""


def _fix(verification: Verification, part: PartFigures, least: float) -> str:
    powers, column = verification.powers, verification.parts.index(part)
    needed = None if powers is None else sqnr_needed(powers.signal[:, column], powers.noise[:, column], least)
    return f"give about {needed} with --validation, or more bits" if needed else "give more samples, or more bits"

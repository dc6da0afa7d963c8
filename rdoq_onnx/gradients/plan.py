"""Plan of reverse passes: the network, the samples, and the number of vectors v per sample.

Random signs v give E_v[(vᵀJΔ)²] = ‖JΔ‖² (supplement, Eq. 3 to 5); for few outputs, v runs over the unit vectors
instead, which is exact.
"""

from dataclasses import dataclass

import onnx

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.observation.distortion import Metric
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.threads import Workers

EXACT_ROWS = 16
LEAST_DRAWS = 32  # of v; fewer samples run repeatedly, or noise would decide which of many quantizers is best


@dataclass(frozen=True)
class ReversePlan:
    """Reverse passes of `network` over `samples`, `batch` of them at a time.

    seed: of the random v. around: the model to differentiate, with the tensors of `network.model`; None for that model
    itself.
    """

    network: Network
    samples: Samples
    metric: Metric
    runtime: Runtime
    workers: Workers
    batch: int
    seed: int
    around: onnx.ModelProto | None = None

    @property
    def differentiated(self) -> onnx.ModelProto:
        """The model to differentiate."""
        return self.network.model if self.around is None else self.around


def rows_of(elements: int) -> int:
    """Return the number of v per sample in one pass, for `elements` output elements."""
    return elements if elements <= EXACT_ROWS else 1


def rounds(samples: int) -> int:
    """Return how many random v each of `samples` samples needs."""
    return -(-LEAST_DRAWS // samples)


def draws(samples: int, elements: int) -> int:
    """Return how many values of ⟨g, Δ⟩² a curve averages."""
    rows = rows_of(elements)
    return samples * (rows if rows > 1 else rounds(samples))

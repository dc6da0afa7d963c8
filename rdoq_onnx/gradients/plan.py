"""What reverse passes are made of: the network, the samples, and how many vectors v each of these gets.

Random signs v give E_v[(vᵀJΔ)²] = ‖JΔ‖² (supplement, Eq. 3 to 5); where outputs are few, v runs over the unit vectors
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
LEAST_DRAWS = 32  # of v: fewer samples are gone over again, or the best of many quantizers would be the luckiest


@dataclass(frozen=True)
class ReversePlan:
    """Reverse passes of `network` over `samples`, `batch` of them at a time.

    seed: of the random v. around: the model whose Jacobian is taken, with the tensors of `network.model`; None for
    that model itself.
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
        """The model whose Jacobian is taken."""
        return self.network.model if self.around is None else self.around


def rows_of(elements: int) -> int:
    """The number of v that are gone through for each sample of an output of `elements` elements."""
    return elements if elements <= EXACT_ROWS else 1


def rounds(samples: int) -> int:
    """How often random v are drawn for each of `samples` samples."""
    return -(-LEAST_DRAWS // samples)


def draws(samples: int, elements: int) -> int:
    """How many values of ⟨g, Δ⟩² a curve is the mean of."""
    rows = rows_of(elements)
    return samples * (rows if rows > 1 else rounds(samples))

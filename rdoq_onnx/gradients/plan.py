"""Plan of reverse passes: the network, the samples, and the number of vectors v per sample.

Random signs v give E_v[(vᵀJΔ)²] = ‖JΔ‖² (supplement, Eq. 3 to 5); for few outputs, v runs over the unit vectors
instead, which is exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.blocks import MOST_BLOCKS, Block, in_blocks
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.observation.distortion import Metric
from rdoq_onnx.system.progress import Advance, Unfinished
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.summation import Sum, Work
from rdoq_onnx.system.threads import Workers

EXACT_ROWS = 16
SHAPES = 8  # of samples; each takes a graph of its own
LEAST_DRAWS = 32  # of v; fewer samples run repeatedly, or noise would decide which of many quantizers is best
MOST_DRAWS = 256


@dataclass(frozen=True)
class ReversePlan:
    """Reverse passes of `network` over `samples`, `batch` of them at a time.

    The reverse graph is of one shape, so the samples of each shape have a plan of their own (`by_shape`); `total` is
    then the number of samples of all, and `start` the number of runs that come before.

    seed: of the random v; draws: their least number over all samples. around: the model to differentiate, with the
    tensors of `network.model`; None for that model itself. name: of the sum that the passes are for (summation.py).
    """

    network: Network
    samples: Samples
    metric: Metric
    runtime: Runtime
    workers: Workers
    batch: int
    seed: int
    around: onnx.ModelProto | None = None
    total: int = 0
    start: int = 0
    draws: int = LEAST_DRAWS
    name: str = ""

    def by_shape(self) -> list["ReversePlan"]:
        """Return the plans for the samples of each of the most common shapes."""
        common = differentiated(self.samples)
        parts = common.by_shape()
        if len(parts) == 1:
            return [replace(self, samples=common)]
        plans, start = [], 0
        for part in parts:
            batch = min(self.batch, len(part))
            plans.append(replace(self, samples=part, batch=batch, total=len(common), start=start))
            start += plans[-1].rounds() * len(part)
        return plans

    def units(self, exact: bool = True) -> bool:
        """Whether v runs over the unit vectors; exact: whether it may."""
        return exact and self.metric.elements <= EXACT_ROWS

    def rounds(self, exact: bool = True) -> int:
        """Return how often each sample runs; `exact` as in `units`."""
        return 1 if self.units(exact) else rounds(self.total or len(self.samples), self.draws)

    def blocks(self, exact: bool = True) -> list[Block]:
        """Return the runs of all samples, of one shape, in blocks; `exact` as in `units`."""
        rounds, count = self.rounds(exact), len(self.samples)
        most = max(MOST_BLOCKS // rounds, 1)
        return [b for k in range(rounds) for b in in_blocks(self.samples, self.batch, self.start + k * count, most)]

    def travelling(self) -> "ReversePlan":
        """Return the plan without its samples, which come block by block."""
        return replace(self, samples=Samples(self.samples.source, {}))

    def summed(self, works: Sequence[Work], advance: Advance, exact: bool, unfinished: Unfinished | None = None) -> Any:
        """Return the sum over all runs, of which each shape has one of `works`; `exact` as in `units`."""
        blocks = [(k, block) for k, part in enumerate(self.by_shape()) for block in part.blocks(exact)]
        return self.workers.total(Sum(self.name, works, blocks), advance, unfinished)

    def averaged(self) -> int:
        """Return how many values of ⟨g, Δ⟩² a curve averages."""
        return draws(len(differentiated(self.samples)), self.metric.elements, self.draws)

    @property
    def differentiated(self) -> onnx.ModelProto:
        """The model to differentiate."""
        return self.network.model if self.around is None else self.around


def differentiated(samples: Samples) -> Samples:
    """Return those of `samples` that run backwards: those of the most common shapes."""
    return samples.of_common_shapes(SHAPES)


def rows_of(elements: int) -> int:
    """Return the number of v per sample in one pass, for `elements` output elements."""
    return elements if elements <= EXACT_ROWS else 1


def rounds(samples: int, least: int = LEAST_DRAWS) -> int:
    """Return how many random v each of `samples` samples needs, so that there are `least` of them."""
    return -(-least // samples)


def draws(samples: int, elements: int, least: int = LEAST_DRAWS) -> int:
    """Return how many values of ⟨g, Δ⟩² a curve averages, for `elements` output elements; least: as in `rounds`."""
    rows = rows_of(elements)
    return samples * (rows if rows > 1 else rounds(samples, least))

"""The best trial of a refinement so far, and the steps that led to it."""

from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.allocation.budget import allocate_bits, allocate_near
from rdoq_onnx.candidates.activations import refined
from rdoq_onnx.config import Config
from rdoq_onnx.model.codes import Affine
from rdoq_onnx.refinement.diversion import Diverted, diverted
from rdoq_onnx.refinement.judge import Judge
from rdoq_onnx.refinement.plan import WEIGHS, Plan, rows_by_distortion
from rdoq_onnx.refinement.trial import SURE, Trial, better, significantly_worse, surely_diverted
from rdoq_onnx.system.progress import Advance

PARTS = "widths near one another, for the sake of each part"
_DISTANCES = (2, 1)  # from one width everywhere, in bits


@dataclass(frozen=True)
class Step:
    """Distortion on the judging samples before and after one kind of trial, and of the last such trial."""

    name: str
    before: float
    after: float
    tried: float


class Best:
    """The best trial so far, and the steps that led to it."""

    def __init__(self, allocation: Allocation, judge: Judge, advance: Advance) -> None:
        self._judge, self._advance = judge, advance
        self._steps: dict[str, Step] = {}
        self._trial = self.tried(allocation)

    @property
    def allocation(self) -> Allocation:
        return self._trial.allocation

    @property
    def model(self) -> onnx.ModelProto:
        return self._trial.model

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(self._steps.values())

    def step(self, name: str, trial: Allocation, sure: float = 0.0) -> bool:
        """Try `trial`; `keep` it if it is better, and return whether it is."""
        return self.keep(name, self.tried(trial), sure)

    def loses(self, share: float) -> bool:
        """Tell whether the distortion is at least `share` of the outputs' power."""
        return self._trial.distortion >= share * self.allocation.measurement.observation.metric.signal

    def tried(self, allocation: Allocation) -> Trial:
        trial = Trial.of(allocation, self._judge)
        self._advance(1)
        return trial

    def keep(self, name: str, trial: Trial, sure: float = 0.0) -> bool:
        """Keep `trial` if it lowers the distortion by at least `sure` standard errors; return whether it did."""
        before, tried = self._trial.distortion, trial.distortion
        if gained := better(self._trial, trial, sure):
            self._trial = trial
        first = self._steps.get(name, Step(name, before, before, tried))
        self._steps[name] = replace(first, after=self._trial.distortion, tried=tried)
        return gained

    def divert(self, config: Config) -> tuple[NDArray[np.float64], Diverted | None]:
        """Divert bits towards the divergence if that gains surely and costs little; return the weights of the rows."""
        before, divergence = self._trial, self.allocation.measurement.divergence
        weigh = np.ones(len(self.allocation.measurement.curves.elements))
        if divergence is None or config.sqnr is not None:
            return weigh, None
        allocation, tried = diverted(before.allocation, divergence, config.budgets)
        gained = surely_diverted(before, trial := self.tried(allocation))
        if gained is None:
            return weigh, None
        self._trial = trial
        return tried, gained

    def protect(self, uniform: Trial, config: Config) -> None:
        """Leave no part of the outputs worse than `uniform` widths do: by widths nearer to those, or by themselves."""
        before, errors = self._trial, uniform.errors
        if errors.shape[1] == 1 or not significantly_worse(before.errors, errors):
            return
        near = (
            Trial.of(allocate_near(uniform.allocation, config.budgets, distance), self._judge)
            for distance in _DISTANCES
        )
        self._trial = next((trial for trial in near if not significantly_worse(trial.errors, errors)), uniform)
        after = self._trial.distortion
        self._steps[PARTS] = Step(PARTS, before.distortion, after, after)

    def swap(self, config: Config, plan: Plan, weigh: NDArray[np.float64]) -> None:
        """Move bits between layers and activations, greatest distortion first; weigh: of the rows so far."""
        measurement = self.allocation.measurement
        for _ in range(plan.rounds):
            improved, idle = False, 0
            for rows in rows_by_distortion(self.allocation)[: plan.groups]:
                idle += 1
                for factor in WEIGHS:
                    tried = weigh.copy()
                    tried[rows] *= factor
                    trial = allocate_bits(measurement, config.budgets, tried, self.allocation.bound)
                    if not _same(trial, self.allocation) and self.step("bit swaps", trial, SURE):
                        weigh, improved, idle = tried, True, 0
                        break
                if idle == plan.patience:
                    break
            if not improved:
                return

    def clip(self, plan: Plan) -> None:
        """Move the ends of the activations' ranges, greatest distortion first."""
        measurement, bits = self.allocation.measurement, self.allocation.activation_bits
        distortions = self.allocation.distortions[measurement.channels :]
        for k in np.argsort(-distortions, kind="stable")[: plan.clips]:
            tensor = measurement.network.activations[k].tensor
            chosen = measurement.activations[k].quantizers[bits[k]]
            for other in refined(chosen, *measurement.observation.reach(tensor))[1:]:
                if self.step("clipping", _with_quantizer(self.allocation, int(k), other), SURE):
                    break


def _with_quantizer(allocation: Allocation, k: int, quantizer: Affine) -> Allocation:
    """Replace the quantizer of activation `k` at its width."""
    activations = list(allocation.measurement.activations)
    quantizers = {**activations[k].quantizers, allocation.activation_bits[k]: quantizer}
    activations[k] = replace(activations[k], quantizers=quantizers)
    return replace(allocation, measurement=replace(allocation.measurement, activations=tuple(activations)))


def _same(one: Allocation, other: Allocation) -> bool:
    pairs = zip(one.layer_bits, other.layer_bits, strict=True)
    return one.activation_bits == other.activation_bits and all((a == b).all() for a, b in pairs)

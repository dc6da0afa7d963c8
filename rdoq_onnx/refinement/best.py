"""The best trial of a refinement so far, and the trials of each kind that look for a better one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.allocation.budget import allocate_bits, allocate_near
from rdoq_onnx.candidates.activations import refined
from rdoq_onnx.config import Config
from rdoq_onnx.refinement.diversion import Diverted, diverted
from rdoq_onnx.refinement.judge import Judge
from rdoq_onnx.refinement.lookahead import judged
from rdoq_onnx.refinement.plan import WEIGHS, Plan, rows_by_distortion
from rdoq_onnx.refinement.trial import SURE, Trial, better, significantly_worse, surely_diverted
from rdoq_onnx.system.progress import Advance
from rdoq_onnx.system.summation import Compute, here

T = TypeVar("T")
Float = NDArray[np.float64]

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

    def __init__(self, allocation: Allocation, judge: Judge, advance: Advance, compute: Compute = here) -> None:
        self._judge, self._advance, self._compute = judge, advance, compute
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

    def first_better(self, name: str, proposals: Iterable[tuple[T, Allocation]], sure: float = 0.0) -> T | None:
        """Keep the first of `proposals` that is better, in their order; return its key, or None if there is none."""
        for key, trial in judged(proposals, self._judge, self._compute):
            self._advance(1)
            if self.keep(name, trial, sure):
                return key
        return None

    def one_by_one(
        self,
        name: str,
        items: Sequence[T],
        trials: Callable[[Sequence[T]], Iterable[tuple[int, Allocation]]],
        sure: float = 0.0,
    ) -> None:
        """Try each of `items` behind those kept so far; trials: yields the index, and the allocation, of each item."""
        while items:
            done = self.first_better(name, trials(items), sure)
            if done is None:
                return
            items = items[done + 1 :]

    def swap(self, config: Config, plan: Plan, weigh: Float) -> None:
        """Move bits between layers and activations, greatest distortion first; weigh: of the rows so far."""
        for _ in range(plan.rounds):
            improved, waiting = False, rows_by_distortion(self.allocation)[: plan.groups]
            while waiting:
                near = self._weighted(waiting[: plan.patience], weigh, config)
                found = self.first_better("bit swaps", near, SURE)
                if found is None:
                    break
                done, weigh = found
                improved, waiting = True, waiting[done + 1 :]
            if not improved:
                return

    def _weighted(
        self, groups: Sequence[slice], weigh: Float, config: Config
    ) -> Iterator[tuple[tuple[int, Float], Allocation]]:
        """Yield (index of the group, weights of the rows) and the allocation for each of `groups` and factors."""
        before = self.allocation
        for k, rows in enumerate(groups):
            for factor in WEIGHS:
                tried = weigh.copy()
                tried[rows] *= factor
                trial = allocate_bits(before.measurement, config.budgets, tried, before.bound)
                if not _same(trial, before):
                    yield (k, tried), trial

    def clip(self, plan: Plan) -> None:
        """Move the ends of the activations' ranges, greatest distortion first."""
        distortions = self.allocation.distortions[self.allocation.measurement.channels :]
        self.one_by_one("clipping", np.argsort(-distortions, kind="stable")[: plan.clips].tolist(), self._clipped, SURE)

    def _clipped(self, activations: Sequence[int]) -> Iterator[tuple[int, Allocation]]:
        """Yield the index in `activations`, and the allocation, for each other range of each of these."""
        before = self.allocation
        measurement = before.measurement
        for n, k in enumerate(activations):
            chosen = measurement.activations[k].quantizers[before.activation_bits[k]]
            reach = measurement.observation.reach(measurement.network.activations[k].tensor)
            for other in refined(chosen, *reach)[1:]:
                yield n, before.with_quantizer(k, other)


def _same(one: Allocation, other: Allocation) -> bool:
    pairs = zip(one.layer_bits, other.layer_bits, strict=True)
    return one.activation_bits == other.activation_bits and all((a == b).all() for a, b in pairs)

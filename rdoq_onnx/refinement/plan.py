"""How many refinement trials of each kind an effort allows, within a bound on work."""

from dataclasses import dataclass, replace

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.config import Effort
from rdoq_onnx.curves.large import LARGE

WEIGHS = (1.8, 0.55)  # factors on the weight of a group's curves
_WORK = 8e10  # elements that swap trials may compute, and clipping trials: some minutes each
_FITTED = 4  # a trial that fits weights, in trials that do not
_CLIPS = 4  # trials for an activation, on average


@dataclass(frozen=True)
class Plan:
    """The maximum number of trials.

    portions: number of portions in which the layers are re-rounded, before curves are re-measured; 0 for neither.
    rounds, groups: rounds of bit swaps, and layers and activations tried in each; patience: how many of these may gain
    nothing in a row. clips: activations with clipping trials. fits: shares of the layers whose scales and biases are
    fitted; alone: how many layers are then fitted again one by one. ridges: portions of the layers of a network that is
    not large, for ridge regression.
    """

    portions: int = 0
    rounds: int = 0
    groups: int = 0
    patience: int = 0
    clips: int = 0
    fits: tuple[float, ...] = ()
    alone: int = 0
    ridges: int = 0

    @classmethod
    def of(cls, effort: Effort, allocation: Allocation, judging: int) -> "Plan":
        """Return the plan of `effort` if each trial runs `judging` samples; expensive networks get fewer swaps."""
        work = judging * sum(allocation.measurement.observation.sizes.values())
        groups, measurement = len(rows_by_distortion(allocation)), allocation.measurement
        plan = EFFORTS[effort].within(work, groups, len(allocation.activation_bits), len(measurement.network.layers))
        large = measurement.curves.elements[: measurement.channels].sum() >= LARGE
        return replace(plan, ridges=0) if large else plan

    def within(self, work: int, groups: int, activations: int, layers: int) -> "Plan":
        """Limit the plan to the bound on work, given a trial's `work` in elements, and to what the network has."""
        work = max(work, 1)  # all tensors may be empty
        swaps = max(1, int(_WORK / (work * len(WEIGHS))))
        groups = min(self.groups, swaps, groups)
        rounds = min(self.rounds, swaps // groups) if groups else 0
        clips = min(self.clips, int(_WORK / (work * _CLIPS)), activations)
        alone = min(self.alone, int(_WORK / work), layers)
        portions, ridges = min(self.portions, layers), min(self.ridges, int(_WORK / (_FITTED * work)), layers)
        return replace(self, portions=portions, ridges=ridges, rounds=rounds, groups=groups, clips=clips, alone=alone)

    @property
    def trials(self) -> int:
        """Return the maximum number of trials, with the first measurement, first order, diversion, uniform widths."""
        around = (self.portions + 1 if self.portions else 0) + self.ridges
        swaps, clips = self.rounds * self.groups * len(WEIGHS), 2 * _CLIPS * self.clips
        return 3 + around + swaps + clips + len(self.fits) + self.alone


EFFORTS: dict[Effort, Plan] = {
    "fast": Plan(),
    "default": Plan(rounds=1, groups=12, patience=2, fits=(2 / 3,), ridges=40),
    "best": Plan(portions=6, rounds=3, groups=40, patience=40, clips=80, fits=(1 / 3, 2 / 3, 1.0), alone=80, ridges=80),
}


def rows_by_distortion(allocation: Allocation) -> list[slice]:
    """List the rows of each layer and each activation within a budget, greatest distortion first."""
    measurement = allocation.measurement
    first = measurement.channels
    rows = measurement.unit_rows()
    rows += [slice(first + k, first + k + 1) for k, a in enumerate(measurement.network.activations) if not a.fusion]
    distortions = allocation.distortions
    return sorted(rows, key=lambda r: -float(distortions[r].sum()))

"""How much refinement an effort buys: trials of each kind, within a bound on work."""

from dataclasses import dataclass, replace

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.config import Effort

WEIGHS = (1.8, 0.55)  # what a group's curves count, relative to what they count now
_WORK = 8e10  # elements that the trials of swaps may compute, and those of clips: some minutes
_CLIPS = 4  # trials for an activation, on average


@dataclass(frozen=True)
class Plan:
    """How many trials to make, at most.

    portions: of the layers, in which they are rounded again and curves are measured again after; 0 for neither.
    rounds, groups: how often swaps are tried, and in how many layers and activations each time; patience: how many of
    these may gain nothing one after another. clips: activations whose range is tried anew. fits: shares of the layers,
    whose scales and biases are fitted; alone: how many of them are then fitted again, each by itself.
    """

    portions: int = 0
    rounds: int = 0
    groups: int = 0
    patience: int = 0
    clips: int = 0
    fits: tuple[float, ...] = ()
    alone: int = 0

    @classmethod
    def of(cls, effort: Effort, allocation: Allocation, judging: int) -> "Plan":
        """What `effort` asks for where each trial runs `judging` samples; fewer swaps on networks of much work."""
        work = judging * sum(allocation.measurement.observation.sizes.values())
        groups = len(rows_by_distortion(allocation))
        return EFFORTS[effort].within(work, groups, len(allocation.activation_bits), len(allocation.layer_bits))

    def within(self, work: int, groups: int, activations: int, layers: int) -> "Plan":
        """No more than what a trial's `work`, in elements, allows, and than there is to swap, to clip and to fit."""
        swaps = max(1, int(_WORK / (work * len(WEIGHS))))
        groups = min(self.groups, swaps, groups)
        rounds = min(self.rounds, swaps // groups) if groups else 0
        clips = min(self.clips, int(_WORK / (work * _CLIPS)), activations)
        alone = min(self.alone, int(_WORK / work), layers)
        return replace(self, rounds=rounds, groups=groups, clips=clips, alone=alone)

    @property
    def trials(self) -> int:
        """All of them, with the measurement of what is there and the trial of uniform widths."""
        around = self.portions + 1 if self.portions else 0
        swaps, clips = self.rounds * self.groups * len(WEIGHS), 2 * _CLIPS * self.clips
        return 2 + around + swaps + clips + len(self.fits) + self.alone


EFFORTS: dict[Effort, Plan] = {
    "fast": Plan(),
    "default": Plan(rounds=1, groups=12, patience=2, fits=(2 / 3,)),
    "best": Plan(portions=6, rounds=3, groups=40, patience=40, clips=80, fits=(1 / 3, 2 / 3, 1.0), alone=80),
}


def rows_by_distortion(allocation: Allocation) -> list[slice]:
    """The rows of each layer and each activation within a budget, in the order of the distortion that they take."""
    measurement = allocation.measurement
    first = measurement.channels
    rows = measurement.unit_rows()
    rows += [slice(first + k, first + k + 1) for k, a in enumerate(measurement.network.activations) if not a.fusion]
    taken = allocation.distortions
    return sorted(rows, key=lambda r: -float(taken[r].sum()))

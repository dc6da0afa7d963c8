"""How much refinement an effort buys: trials of each kind, within a bound on work."""

from dataclasses import dataclass

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.config import Effort

WEIGHS = (1.8, 0.55)  # what a group's curves count, relative to what they count now
# For each effort: portions re-rounded, rounds of swaps, groups in each, how many of them may gain nothing in a row,
# activations clipped anew, shares of the layers re-fitted, layers re-fitted one by one after that.
_TRIALS: dict[Effort, tuple[int, int, int, int, int, tuple[float, ...], int]] = {
    "fast": (0, 0, 0, 0, 0, (), 0),
    "default": (0, 1, 12, 2, 0, (2 / 3,), 0),
    "best": (6, 3, 40, 40, 80, (1 / 3, 2 / 3, 1.0), 80),
}
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

    portions: int
    rounds: int
    groups: int
    patience: int
    clips: int
    fits: tuple[float, ...]
    alone: int

    @classmethod
    def of(cls, effort: Effort, allocation: Allocation, judging: int) -> "Plan":
        """What `effort` asks for where each trial runs `judging` samples; fewer swaps on networks of much work."""
        work = judging * sum(allocation.measurement.observation.sizes.values())
        units = len(rows_by_distortion(allocation))
        return cls.within(effort, work, units, len(allocation.activation_bits), len(allocation.layer_bits))

    @classmethod
    def within(cls, effort: Effort, work: int, units: int, activations: int, layers: int) -> "Plan":
        """The same from what a trial computes, in elements, and from what may be swapped, clipped and fitted."""
        portions, rounds, groups, patience, clips, fits, alone = _TRIALS[effort]
        swaps = max(1, int(_WORK / (work * len(WEIGHS))))
        groups = min(groups, swaps, units)
        rounds = min(rounds, swaps // groups) if groups else 0
        clips = min(clips, int(_WORK / (work * _CLIPS)), activations)
        return cls(portions, rounds, groups, patience, clips, fits, min(alone, int(_WORK / work), layers))

    @property
    def trials(self) -> int:
        """All of them, with the measurement of what is there and the trial of uniform widths."""
        around = self.portions + 1 if self.portions else 0
        swaps, clips = self.rounds * self.groups * len(WEIGHS), 2 * _CLIPS * self.clips
        return 2 + around + swaps + clips + len(self.fits) + self.alone


def rows_by_distortion(allocation: Allocation) -> list[slice]:
    """The rows of each layer and each activation within a budget, in the order of the distortion that they take."""
    measurement = allocation.measurement
    first = measurement.channels
    rows = measurement.unit_rows()
    rows += [slice(first + k, first + k + 1) for k, a in enumerate(measurement.network.activations) if not a.fusion]
    taken = allocation.distortions
    return sorted(rows, key=lambda r: -float(taken[r].sum()))

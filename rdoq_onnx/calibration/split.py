"""Split the samples of a run into fitting, measuring and held-out parts."""

from dataclasses import dataclass, replace

from rdoq_onnx.calibration.samples import Samples

HELD_OUT = 0.15  # share of the samples reserved for verification
FITTING = 2 / 3  # share of the rest that rounding is fitted to
FEW_SAMPLES = 16


@dataclass(frozen=True)
class SampleSplit:
    """The samples of a run, split once.

    held_out: reserved for verification. seen: all others. fitting: the part of `seen` that moments and rounding are
    fitted to. measuring: the rest of `seen`, on which weight curves are measured. judging: the samples on which
    activations are measured: `measuring`, or all of `seen` where that is small, as only ranges were fitted to it.
    search: the samples that a goal's bits are searched on, which `held_out` then has to confirm.
    """

    seen: Samples
    fitting: Samples
    measuring: Samples
    judging: Samples
    held_out: Samples
    search: Samples

    @classmethod
    def of(cls, samples: Samples, seed: int) -> "SampleSplit":
        """Hold out a part of `samples` and split the rest, at random by `seed`."""
        seen, held_out = samples.split(1 - HELD_OUT, seed)
        return cls._seen(seen, held_out, seed)

    @classmethod
    def whole(cls, samples: Samples, seed: int) -> "SampleSplit":
        """Hold nothing out, for a measurement without verification."""
        return cls._seen(samples, samples.take(slice(0, 0)), seed)

    @classmethod
    def _seen(cls, seen: Samples, held_out: Samples, seed: int) -> "SampleSplit":
        fitting, measuring = seen.split(FITTING, seed + 1)
        if not len(measuring):
            fitting = measuring = seen
        judging = seen if len(measuring) < FEW_SAMPLES else measuring
        return cls(seen, fitting, measuring, judging, held_out, measuring)

    def validated(self, samples: Samples, seed: int, searching: bool) -> "SampleSplit":
        """Verify on other `samples`; when `searching` for the bits of a goal, search on one half of them."""
        search, held_out = samples.split(0.5, seed + 2) if searching else (self.search, samples)
        return replace(self, search=search, held_out=held_out)

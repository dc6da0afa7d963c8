"""How the samples of a run are split: fitted to, measured on, held out."""

from dataclasses import dataclass

from rdoq_onnx.calibration.samples import Samples

HELD_OUT = 0.15  # share of the samples that only verification sees
FITTING = 2 / 3  # share of the others that rounding is fitted to
FEW_SAMPLES = 16


@dataclass(frozen=True)
class SampleSplit:
    """The samples of a run, split once.

    held_out: samples that only verification sees. seen: all others. fitting: samples of these that moments and
    rounding are fitted to. measuring: the rest, which curves of weights are measured on. judging: samples that
    activations are measured on, all of `seen` where `measuring` has few, as only ranges were fitted to them.
    """

    seen: Samples
    fitting: Samples
    measuring: Samples
    judging: Samples
    held_out: Samples

    @classmethod
    def of(cls, samples: Samples, seed: int) -> "SampleSplit":
        """Hold a part of `samples` out and split the others; `seed` decides which."""
        seen, held_out = samples.split(1 - HELD_OUT, seed)
        return cls._seen(seen, held_out, seed)

    @classmethod
    def whole(cls, samples: Samples, seed: int) -> "SampleSplit":
        """Hold nothing out: for a measurement that no verification follows."""
        return cls._seen(samples, samples.take(slice(0, 0)), seed)

    @classmethod
    def _seen(cls, seen: Samples, held_out: Samples, seed: int) -> "SampleSplit":
        fitting, measuring = seen.split(FITTING, seed + 1)
        if not len(measuring):
            fitting = measuring = seen
        judging = seen if len(measuring) < FEW_SAMPLES else measuring
        return cls(seen, fitting, measuring, judging, held_out)

"""How the samples of a run are split: fitted to, measured on, held out."""



from rdoq_onnx.calibration.samples import Samples

HELD_OUT = 0.15  # share of the samples that only verification sees
FITTING = 2 / 3  # share of the samples that rounding is fitted to
FEW_SAMPLES = 16


def split(samples: Samples, seed: int) -> tuple[Samples, Samples]:
    """Samples that rounding is fitted to, and samples that curves are measured on."""
    first, second = samples.split(FITTING, seed + 1)
    return (first, second) if len(second) else (samples, samples)


def judging(samples: Samples, seed: int) -> Samples:
    """Samples that activations are measured on: all where they are few, as only ranges were fitted to them."""
    measuring = split(samples, seed)[1]
    return samples if len(measuring) < FEW_SAMPLES else measuring

"""How figures are worded in table, page and advice."""

import math
import shlex
from collections.abc import Mapping

from rdoq_onnx.analysis.patterns import as_pattern


def pin_of(name: str, bits: float) -> str:
    """The option that fixes the width of the layer or activation `name`, as a shell reads it."""
    return f"--pin {shlex.quote(f'{as_pattern(name)}={round(bits)}')}"


def decibels(before: float, after: float) -> str:
    return f"{10 * math.log10(before / after):.2f} dB" if before > 0 and after > 0 else "0 dB"


def histogram(counts: Mapping[int, int]) -> str:
    return "  ".join(f"{bits}b:{n}" for bits, n in counts.items())


def human_bytes(count: int) -> str:
    """A file size in kB or MB of 1000."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def times(seconds: Mapping[str, float]) -> str:
    """The time of the run, and that of each step that takes a fiftieth of it or more."""
    total = sum(seconds.values())
    steps = ", ".join(f"{name} {s:.1f}" for name, s in seconds.items() if s >= total / 50)
    return f"{total:.1f} s: {steps}"


def kernel_words(kernels: Mapping[str, int]) -> str:
    integer = {op: n for op, n in kernels.items() if op.startswith(("QLinear", "QGemm")) or "Integer" in op}
    return ", ".join(f"{n} {op}" for op, n in integer.items()) or "none"

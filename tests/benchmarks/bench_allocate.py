"""Time and memory of the allocation for 1 thousand to 1 million units at 9 widths.

    python tests/benchmarks/bench_allocate.py

Each row is the median of three runs of `solve` on curves made beforehand; memory is the peak of numpy
and Python during a further run, without the curves. The last line is the exponent of time over units,
fitted on the logarithms from 10,000 units on and over all.
"""

import sys
import time
import tracemalloc

import numpy as np

from rdoq_onnx.allocation.allocate import solve
from rdoq_onnx.curves.curves import Curves

UNITS = (1_000, 10_000, 100_000, 1_000_000)
WIDTHS = np.arange(9)
LAYERS = np.array([9, 27, 64, 144, 256, 576, 960, 1152, 2304, 4608])  # elements of a channel


def random_curves(units: int, seed: int = 0) -> Curves:
    """Draw curves that fall about fourfold per bit, with 20 % measurement noise."""
    rng = np.random.default_rng(seed)
    level = 10.0 ** rng.uniform(-6, 0, (units, 1))
    decay = rng.uniform(2.5, 5.0, (units, 1)) ** -WIDTHS
    noise = rng.lognormal(0.0, 0.2, (units, WIDTHS.size))
    return Curves(WIDTHS, rng.choice(LAYERS, units), level * decay * noise)


def seconds(curves: Curves, budget: int) -> float:
    """Return the CPU time, median of three runs; numpy uses one core here, and other processes do not count."""
    runs = []
    for _ in range(3):
        start = time.process_time()
        solve(curves, budget)
        runs.append(time.process_time() - start)
    return sorted(runs)[1]


def peak_bytes(curves: Curves, budget: int) -> int:
    """Return the peak memory of one run beyond what was held before it."""
    tracemalloc.start()
    solve(curves, budget)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def main() -> None:
    """Print the table."""
    sys.stdout.write(" units bits   seconds  solve MiB  curves MiB       gap\n".rjust(59))
    times = []
    for units in UNITS:
        curves = random_curves(units)
        for bits in (2, 4, 6):
            budget = bits * int(curves.elements.sum())
            took, peak, gap = seconds(curves, budget), peak_bytes(curves, budget), solve(curves, budget).gap
            held = curves.distortion.nbytes + curves.elements.nbytes
            sys.stdout.write(
                f"{units:>8} {bits:>4} {took:>9.4f} {peak / 2**20:>10.1f} {held / 2**20:>11.1f} {gap:>9.1e}\n"
            )
            if bits == 4:
                times.append(took)
    whole = np.polyfit(np.log(UNITS), np.log(times), 1)[0]
    large = np.polyfit(np.log(UNITS[1:]), np.log(times[1:]), 1)[0]
    sys.stdout.write(f"exponent at 4 bits: {whole:.2f} over all, {large:.2f} from 10,000 units on\n")


if __name__ == "__main__":
    main()

"""Time calls in turns, so that whatever else slows the machine slows all of them alike."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_MOST_TURNS = 15
_MANY, _SHORT = 100, 0.1
# Windows counts a process's time in ticks of 16 ms.
_processor_time = time.perf_counter if sys.platform == "win32" else time.process_time


class Took(NamedTuple):
    """The seconds of a call: by the clock, and of all its threads on a processor."""

    wall: float
    processor: float


def turns(runs: Sequence[Callable[[], object]], seconds: float, most: int = _MOST_TURNS) -> list[list[Took]]:
    """Call `runs` in turns, in alternating order, for about `seconds`; return what each call of each turn took.

    most: maximum number of turns; short ones go on to _MANY within _SHORT seconds.

    The first turn warms up and is left out, unless there is time for no other.
    """
    begin, taken = time.perf_counter(), list[list[Took]]()

    def goes_on() -> bool:
        if not taken:
            return True
        end = time.perf_counter() - begin + sum(took.wall for took in taken[-1])
        return end < seconds if len(taken) <= most else end < _SHORT and len(taken) <= _MANY

    while goes_on():
        order = range(len(runs)) if len(taken) % 2 == 0 else reversed(range(len(runs)))
        measured = {k: time_of(runs[k]) for k in order}
        taken.append([measured[k] for k in range(len(runs))])
    return taken[1:] or taken


def run_times(taken: Sequence[Sequence[Took]], busy: bool) -> NDArray[np.float64]:
    """Return the seconds of each run of each turn, [turns, runs]: by the clock, or of processors if `busy`."""
    return np.asarray(taken, np.float64)[..., 1 if busy else 0]


def time_of(run: Callable[[], object]) -> Took:
    """Return what a call takes."""
    wall, processor = time.perf_counter(), _processor_time()
    run()
    return Took(time.perf_counter() - wall, _processor_time() - processor)

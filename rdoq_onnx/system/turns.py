"""Time calls in turns, so that whatever else slows the machine slows all of them alike."""

import time
from collections.abc import Callable, Sequence

_MOST_TURNS = 15


def turns(runs: Sequence[Callable[[], object]], seconds: float, most: int = _MOST_TURNS) -> list[list[float]]:
    """Call `runs` in turns, in alternating order, for about `seconds`; return the seconds of each call of each turn.

    most: maximum number of turns.

    The first turn warms up and is left out, unless there is time for no other.
    """
    begin, taken = time.perf_counter(), list[list[float]]()
    while len(taken) <= most and (not taken or time.perf_counter() - begin + sum(taken[-1]) < seconds):
        order = range(len(runs)) if len(taken) % 2 == 0 else reversed(range(len(runs)))
        measured = {k: seconds_of(runs[k]) for k in order}
        taken.append([measured[k] for k in range(len(runs))])
    return taken[1:] or taken


def seconds_of(run: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin

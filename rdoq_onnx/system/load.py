"""How much of its processors' time this process leaves to, or loses to, other work."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

BUSY = 0.1  # share of the processors' time, taken by other work, from which times by the clock mean nothing
_STAT = Path("/proc/stat")
_BUSY = (0, 1, 2, 5, 6, 7)  # of its columns: user, nice, system, irq, softirq, steal


@dataclass(frozen=True)
class Clocks:
    """Seconds by the clock, of this process on processors, and of all work on its processors; None if not known."""

    wall: float
    own: float
    everything: float | None

    @classmethod
    def now(cls) -> "Clocks":
        return cls(time.perf_counter(), time.process_time(), _everything(_STAT, _processors()))

    def others(self, before: "Clocks") -> float:
        """Return the share of the processors' time since `before` that other work took.

        Where the system does not tell, it is what kept this process from one processor, as if it always had work.
        """
        wall, own = max(self.wall - before.wall, 1e-9), self.own - before.own
        if self.everything is None or before.everything is None:
            return min(max(1 - own / wall, 0.0), 1.0)
        return min(max((self.everything - before.everything - own) / (wall * len(_processors())), 0.0), 1.0)


def _processors() -> frozenset[int]:
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset({0})


def _everything(stat: Path, processors: frozenset[int]) -> float | None:
    """Return the seconds that `processors` were not idle, of the kernel's table; None without one."""
    if not stat.exists():
        return None
    rows = [line.split() for line in stat.read_text().splitlines() if line[:3] == "cpu" and line[3:4].isdigit()]
    known = {int(name[3:]): [int(x) for x in columns] for name, *columns in rows}
    if not processors <= known.keys():
        return None
    return sum(known[p][k] for p in processors for k in _BUSY) / os.sysconf("SC_CLK_TCK")

"""The double-buffered memories of SCALE-Sim 3, stepped from one miss or drain to the next instead of line by line.

Cycles and words are those of its `read_buffer`, `write_buffer` and `double_buffered_scratchpad`, whose rules are kept
as they are (`bench_hardware.py check` compares). A line is what the array asks for in one cycle; -1 asks for nothing.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.integer[Any]]

LINES = 4096  # looked at together
SETS = 100  # what SCALE-Sim divides a buffer into


def run(reads: "tuple[Reads, Reads]", writes: "Writes", lines: int) -> int:
    """Serve all lines; return the cycles with those of the first fetch."""
    line = stalls = served = 0
    while line < lines:
        end = min(*(each.next_miss(line) for each in reads), lines)
        line = writes.take(line, end, stalls)
        served = line - 1 + stalls
        if line < lines:
            cycle = line + stalls
            waits = writes.serve(line, cycle)
            served = cycle + waits
            stalls += max(*(each.serve(line, cycle) for each in reads), waits)
            line += 1
    writes.finish(served)
    return writes.last - min(each.first for each in reads)


class Reads:
    """Inputs or weights: one half is read while the other is filled with what comes next in a fixed order.

    first, last: the cycles of the first fetch and the end of the latest. words: those fetched so far.
    """

    def __init__(self, order: Integers, demand: Integers, size: int, bandwidth: int) -> None:
        """order: addresses as they are fetched. demand: [lines, ports]. size: words. bandwidth: words a cycle."""
        active = math.ceil(size / 2)
        self._fetch = math.ceil((size - active) / bandwidth)
        self._bandwidth = bandwidth
        first_fetch = min(math.ceil(active / bandwidth), math.ceil(order.size / bandwidth))
        self.first, self.last, self.words = -first_fetch, -1, first_fetch * bandwidth
        valid = order[order != -1]
        base = int(valid.min())
        self._order = valid - base
        self._demand = np.where(demand == -1, -1, demand - base).astype(np.int32)
        self._each = math.ceil(size / SETS)
        self._sets = len(valid) // self._each + 1
        self._active = min(self._sets, math.ceil(active / self._each))
        self._step = min(self._sets - self._active, math.ceil((size - active) / self._each))
        self._start = 0
        self._resident = np.zeros(int(self._order.max()) + 2, bool)
        self._miss: int | None = None
        self._hold()

    def next_miss(self, line: int) -> int:
        """Return the first line from `line` on that asks for what is not there, or the number of lines."""
        if self._miss is None or self._miss < line:
            self._miss = next(self._misses(line), len(self._demand))
        return self._miss

    def serve(self, line: int, cycle: int) -> int:
        """Fetch until all that a line asks for is there; return the cycles that SCALE-Sim adds for it."""
        if self.next_miss(line) != line:
            return 0
        offset = 1
        for address in self._demand[line].tolist():
            while not self._resident[address]:
                self._prefetch()
                late = self.last - (cycle + offset)
                offset += late + max(late, 0)
        return offset - 1

    def _misses(self, line: int) -> Iterator[int]:
        for start in range(line, len(self._demand), LINES):
            found = ~self._resident[self._demand[start : start + LINES]].all(axis=1)
            if found.any():
                yield start + int(found.argmax())

    def _prefetch(self) -> None:
        self._start = (self._start + self._step) % self._sets
        self.last += self._fetch + 1
        self.words += self._fetch * self._bandwidth
        self._hold()

    def _hold(self) -> None:
        """Hold `_active` sets from `_start` on, in a circle."""
        self._resident[:] = False
        self._resident[-1] = True  # what -1 looks up
        end = self._start + self._active
        self._resident[self._order[self._start * self._each : end * self._each]] = True
        if end >= self._sets:
            self._resident[self._order[: (end - self._sets) * self._each]] = True
        self._miss = None


class Writes:
    """Outputs: once one half is full it drains, while the other one fills; a full buffer waits for the drain.

    last: the cycle in which the latest drain ends. words: those written so far.
    """

    def __init__(self, counts: Integers, size: int, bandwidth: int) -> None:
        """counts: the outputs of each line. size: words. bandwidth: words a cycle."""
        self._counts, self._sums = counts, np.concatenate([[0], np.cumsum(counts)])
        self._drained = size - math.ceil(size / 2)
        self._least = size - self._drained  # free words, or a drain starts
        self._free, self._bandwidth = size, bandwidth
        self._rows: list[int] = []  # words of each row that will be written
        self._open = self._done = 0  # words of the row that fills; rows written
        self._busy = 0  # the cycle in which the drain ends
        self.last = self.words = 0

    def take(self, line: int, end: int, stalls: int) -> int:
        """Take lines up to `end`, or to the first that starts a drain or waits for one; return that."""
        while line < end:
            stop = min(line + LINES, end)
            free = self._free - (self._sums[line + 1 : stop + 1] - self._sums[line])
            busy = np.arange(line, stop) + stalls < self._busy
            event = (self._counts[line:stop] > 0) & np.where(busy, free <= 0, free < self._least)
            taken = int(event.argmax()) if event.any() else stop - line
            self._store(int(self._sums[line + taken] - self._sums[line]))
            line += taken
            if event.any():
                break
        return line

    def serve(self, line: int, cycle: int) -> int:
        """Take a line; return the cycles that it waits."""
        current = cycle
        for _ in range(int(self._counts[line])):
            self._store(1)
            if current < self._busy:
                current = self._busy if self._free <= 0 else current
            elif self._free < self._least:
                self._close()
                self._busy = self._drain(current)
        return current - cycle

    def finish(self, cycle: int) -> None:
        self._close()
        while self._done < len(self._rows):
            cycle = self._drain(cycle) + 1

    def _store(self, words: int) -> None:
        self._free -= words
        full, self._open = divmod(self._open + words, self._bandwidth)
        self._rows += [self._bandwidth] * full

    def _close(self) -> None:
        if self._open:
            self._rows.append(self._open)
            self._open = 0

    def _drain(self, cycle: int) -> int:
        """Write one half from `cycle` on; return the cycle of its last row."""
        end = min(self._done + math.ceil(self._drained / self._bandwidth), len(self._rows))
        rows = end - self._done
        words = (rows - 1) * self._bandwidth + self._rows[end - 1]  # of the last row alone SCALE-Sim counts the words
        self._free += words
        self.words += words
        self._done = end
        self.last = max(self.last, cycle + rows - 1)
        return cycle + rows - 1

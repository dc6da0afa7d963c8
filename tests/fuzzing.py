"""A pool of processes for the fuzzers: one that dies or hangs is replaced, and counted as a fault."""

import collections
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

SECONDS = 60

# Runs a numbered case in a folder of its own: (outcome, what it said). An outcome that starts with FAULT is one.
Case = Callable[[int, Path], tuple[str, str]]


def outcomes(case: Case, numbers: range, jobs: int) -> Iterator[tuple[int, str, str]]:
    """(number, outcome, what it said) of all cases. Workers run a stride each; one that dies or hangs is replaced."""
    running: dict[int, tuple[int, int, float]] = {}  # pipe -> process, next number, since when
    buffers: dict[int, str] = {}

    def start(part: range) -> None:
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(reading)
            _work(case, part, writing)
        os.close(writing)
        os.set_blocking(reading, False)
        running[reading], buffers[reading] = (process, part.start, time.monotonic()), ""

    for job in range(jobs):
        start(range(numbers.start + job, numbers.stop, jobs))
    while running:
        time.sleep(0.02)
        for pipe in list(running):
            process, number, since = running[pipe]
            try:
                chunk = os.read(pipe, 1 << 16)
            except BlockingIOError:
                if time.monotonic() - since < SECONDS:
                    continue
                chunk = b""
                os.kill(process, signal.SIGKILL)
            buffers[pipe] += chunk.decode(errors="replace")
            *lines, buffers[pipe] = buffers[pipe].split("\n")
            for line in lines:
                outcome, _, said = line.partition("\t")
                yield number, outcome, said.replace("\v", "\n")
                number += jobs
                running[pipe] = (process, number, time.monotonic())
            if not chunk:
                status = os.waitpid(process, 0)[1]
                os.close(pipe)
                del running[pipe]
                if number < numbers.stop:
                    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
                    yield number, "FAULT hang" if killed else f"FAULT died with status {status}", ""
                    start(range(number + jobs, numbers.stop, jobs))


def _work(case: Case, numbers: range, pipe: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    for number in numbers:
        with tempfile.TemporaryDirectory() as folder:
            outcome, said = case(number, Path(folder))
        text = said.replace("\n", "\v").replace("\t", " ")
        os.write(pipe, f"{outcome}\t{text[-3000:]}\n".encode())
    os._exit(0)


def counted(what: str, found: Iterable[tuple[int, str, str]], all_of_them: bool = False) -> int:
    """Print counts of outcomes, and what cases said: the faults, or all of them. Return the exit status."""
    counts: collections.Counter[str] = collections.Counter()
    for number, outcome, said in found:
        counts[outcome] += 1
        if all_of_them or outcome.startswith("FAULT"):
            say(f"{number}: {outcome}\n{said}")
        if sum(counts.values()) % 500 == 0:
            say(f"so far: {dict(counts)}")
    say(f"{sum(counts.values())} {what}: {dict(sorted(counts.items()))}")
    return int(any(c.startswith("FAULT") for c in counts))


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()

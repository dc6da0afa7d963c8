"""How a run is shown while it goes on: bars for terminals, plain lines with the time for logs, or nothing."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import rich.progress
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from rdoq_onnx.progress import Advance, Progress

EVERY = 20.0  # seconds between the lines of a long step


@contextmanager
def shown(quiet: bool) -> Iterator[Progress]:
    """The progress of a run, on standard error."""
    if quiet:
        yield Progress()
    elif not sys.stderr.isatty():
        yield Lines()
    else:
        bars = Bars(Console(stderr=True))
        with bars.live:
            yield bars


class Lines(Progress):
    """A line at the end of each step, and now and then within a long one."""

    @contextmanager
    def show(self, name: str, total: int) -> Iterator[Advance]:
        begin = last = time.perf_counter()
        done = 0

        def advance(count: int) -> None:
            nonlocal done, last
            done += count
            now = time.perf_counter()
            if now - last >= EVERY and 0 < done < total:
                last = now
                left = (now - begin) * (total - done) / done
                self.note(f"{name}: {done} of {total} parts, about {left:.0f} s left")

        yield advance
        parts = f", {total} parts" if total > 1 else ""
        self.note(f"{name}: {time.perf_counter() - begin:.1f} s{parts}")

    def note(self, text: str) -> None:
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


class Bars(Progress):
    """A bar for each step with the time that it has left, and what is known so far below."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._bars = rich.progress.Progress(
            rich.progress.TextColumn("{task.description:12}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
        )
        self._notes: list[str] = []
        self.live = Live(get_renderable=self._render, console=console, refresh_per_second=8)

    @contextmanager
    def show(self, name: str, total: int) -> Iterator[Advance]:
        task = self._bars.add_task(name, total=total)
        yield lambda done: self._bars.advance(task, done)
        self._bars.update(task, completed=total)

    def note(self, text: str) -> None:
        self._notes.append(text)

    def _render(self) -> Group:
        return Group(self._bars.get_renderable(), *(Text(f"  {note}", style="dim") for note in self._notes))


class Out(Console):
    """Standard output; that its reader has gone is no error, since the model is already written."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

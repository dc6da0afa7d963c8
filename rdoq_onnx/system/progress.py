"""Report the progress of a run's steps; showing it is up to the caller."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

Advance = Callable[[int], None]
OnProgress = Callable[[str, int, int], None]  # name of a step, parts done, their number
LOGGER = logging.getLogger("rdoq_onnx")


class Progress:
    """Record the seconds that each step takes. A subclass may show the steps as they run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str, total: int = 1) -> Iterator[Advance]:
        """Run a step of `total` parts; call the yielded function with the number of parts done since the last call."""
        begin = time.perf_counter()
        with self.show(name, total) as advance:
            yield advance
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    @contextmanager
    def budget(self) -> Iterator[None]:
        """Time the steps of one of several budgets: on exit, restore the seconds of the steps that all share."""
        shared = dict(self.seconds)
        try:
            yield
        finally:
            self.seconds = shared

    def note(self, text: str) -> None:
        """Report an intermediate finding; a no-op here."""

    def expect(self, seconds: Callable[[], Mapping[str, float]], budgets: int = 1, within: float | None = None) -> None:
        """Tell how long each step will take, so that the time left can be shown; a no-op here.

        seconds: estimates them, which takes a while; called only where that is shown. within: seconds that a run of one
            budget should take.
        """

    def show(self, name: str, total: int) -> AbstractContextManager[Advance]:
        """Show a step while its block runs; a no-op here."""
        del name, total
        return nullcontext(lambda done: None)


class Told(Progress):
    """Progress as the Python API reports it: steps and findings to the logger "rdoq_onnx", parts to `function`."""

    def __init__(self, function: OnProgress | None = None) -> None:
        super().__init__()
        self._function = function

    def note(self, text: str) -> None:
        """Log a finding."""
        LOGGER.info("%s", text)

    @contextmanager
    def show(self, name: str, total: int) -> Iterator[Advance]:
        """Tell the start of a step, its parts as they are done, and its end."""
        LOGGER.info("%s: %d parts", name, total)
        function, done = self._function, 0

        def advance(more: int) -> None:
            nonlocal done
            done = min(done + more, total)
            if function is not None:
                function(name, done, total)

        advance(0)
        yield advance
        if done < total:
            advance(total - done)


class Unfinished:
    """The partial result of a long step. A subclass stores it, so that an interrupted run can be resumed."""

    def get(self) -> Any:
        """The last stored value; None if there is none."""
        return None

    def put(self, value: Any) -> None:
        """Store `value`; called often."""
        del value

"""How the steps of a run tell that they move on; what shows it is the caller's."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

Advance = Callable[[int], None]


class Progress:
    """Records the seconds that each step takes; a subclass may show the steps as they run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str, total: int = 1) -> Iterator[Advance]:
        """A step of `total` parts; what it yields is called with the number of parts done since the last call."""
        begin = time.perf_counter()
        with self.show(name, total) as advance:
            yield advance
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    @contextmanager
    def budget(self) -> Iterator[None]:
        """One of several budgets: the next one has a time of its own, besides that of the steps they share."""
        shared = dict(self.seconds)
        try:
            yield
        finally:
            self.seconds = shared

    def note(self, text: str) -> None:
        """Tell something that is known by now; nothing here."""

    def show(self, name: str, total: int) -> AbstractContextManager[Advance]:
        """Show a step while its block runs; nothing here."""
        del name, total
        return nullcontext(lambda done: None)


class Unfinished:
    """What a long step has got so far. A subclass keeps it for a run that takes up where this one was ended."""

    def get(self) -> Any:
        """What was put last, None at the beginning."""
        return None

    def put(self, value: Any) -> None:
        """Keep `value`; called often."""
        del value

"""How far a run is: the estimated seconds of its steps, corrected by what those that ended really took.

    left = pace · Σ estimated seconds of the steps ahead,    pace = (took + prior) / (estimated + prior) of those ended

The prior keeps a first, short step from deciding the pace.
"""

from collections.abc import Mapping

_BEFORE = "normalize"  # over when the estimate is made
_EACH_BUDGET = ("second look", "tuning", "emit", "verify", "latency")  # steps of every budget; all share the others
_PRIOR = 0.1  # of the estimated total


class Outlook:
    """The steps ahead of a run at several budgets; `seconds`: the estimate of each step, at one budget."""

    def __init__(self, seconds: Mapping[str, float], budgets: int = 1) -> None:
        self._each = {name: value for name, value in seconds.items() if name != _BEFORE}
        self._ahead = {name: budgets if name in _EACH_BUDGET else 1 for name in self._each}
        self._prior = _PRIOR * self._sum()
        self._took = self._estimated = 0.0

    def ended(self, name: str, seconds: float) -> None:
        """Take account of a step that has ended; of one that was not expected nothing follows."""
        if not self._ahead.get(name):
            return
        self._ahead[name] -= 1
        self._took += seconds
        self._estimated += self._each[name]
        if name in _EACH_BUDGET:  # measuring is over, also for steps that a checkpoint had
            self._ahead |= {other: 0 for other in self._ahead if other not in _EACH_BUDGET}

    def left(self, name: str = "", share: float = 0.0) -> float:
        """Return the seconds ahead, while `share` of the step `name` is done."""
        running = share * self._each[name] if self._ahead.get(name) else 0.0
        pace = (self._took + self._prior) / max(self._estimated + self._prior, 1e-9)
        return pace * (self._sum() - running)

    def _sum(self) -> float:
        return sum(self._each[name] * count for name, count in self._ahead.items())

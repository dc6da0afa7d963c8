"""How far a run is: the estimated seconds of its steps, corrected by what those that ended really took.

    left = pace · Σ estimated seconds of the steps ahead,    pace = (took + prior) / (estimated + prior) of those ended

The prior keeps a first, short step from deciding the pace. The step that runs goes on as it began. With a bound on the
whole run, tuning fills what the other steps leave of it.
"""

from collections.abc import Mapping

_BEFORE = "normalize"  # over when the estimate is made
_EACH_BUDGET = ("second look", "tuning", "emit", "verify", "latency")  # steps of every budget; all share the others
_FILLING = "tuning"
_PRIOR = 0.1  # of the estimated total


class Outlook:
    """The steps ahead of a run at several budgets.

    seconds: the estimate of each step, at one budget. within: the seconds that a run of one budget should take.
    """

    def __init__(self, seconds: Mapping[str, float], budgets: int = 1, within: float | None = None) -> None:
        self._each = {name: value for name, value in seconds.items() if name != _BEFORE}
        self._ahead = {name: budgets if name in _EACH_BUDGET else 1 for name in self._each}
        self._prior = _PRIOR * self._sum()
        self._took = self._estimated = self._gone = 0.0
        self._within = within

    def ended(self, name: str, seconds: float) -> None:
        """Take account of a step that has ended; of one that was not expected no pace follows."""
        self._gone += seconds
        if not self._ahead.get(name):
            return
        self._ahead[name] -= 1
        self._took += seconds
        self._estimated += self._each[name]
        if name in _EACH_BUDGET:  # measuring is over, also for steps that a checkpoint had
            self._ahead |= {other: 0 for other in self._ahead if other not in _EACH_BUDGET}

    def left(self, name: str = "", share: float = 0.0, spent: float = 0.0) -> float:
        """Return the seconds ahead, while `share` of the step `name` is done in `spent` seconds."""
        pace = (self._took + self._prior) / max(self._estimated + self._prior, 1e-9)
        ahead = pace * self._sum()
        if share > 0 and self._ahead.get(name):
            ahead += spent * (1 - share) / share - pace * self._each[name]
        if self._within is None or name == _FILLING or not self._ahead.get(_FILLING):
            return ahead
        return max(self._within - self._gone - spent, ahead - pace * self._each[_FILLING])

    def _sum(self) -> float:
        return sum(self._each[name] * count for name, count in self._ahead.items())

"""Steps of a run: seconds add up by name, and a subclass sees each part."""

from contextlib import contextmanager

import pytest

from rdoq_onnx.system.progress import Progress, Unfinished


class Shown(Progress):
    """Records the calls to `show`."""

    def __init__(self):
        super().__init__()
        self.seen = []

    @contextmanager
    def show(self, name, total):
        yield lambda done: self.seen.append((name, total, done))


def test_a_step_is_shown_part_by_part():
    progress = Shown()
    with progress.step("taylor", 3) as advance:
        advance(1)
        advance(2)
    assert progress.seen == [("taylor", 3, 1), ("taylor", 3, 2)]


def test_steps_with_one_name_share_an_entry(monkeypatch):
    clock = iter([0, 1, 10, 12, 20, 24])
    monkeypatch.setattr("rdoq_onnx.system.progress.time.perf_counter", lambda: next(clock))
    progress = Progress()
    for name in ("taylor", "verify", "taylor"):
        with progress.step(name) as advance:
            advance(1)
    assert progress.seconds == {"taylor": 5, "verify": 2}


def test_a_step_that_fails_took_no_time():
    progress = Progress()
    with pytest.raises(KeyError), progress.step("taylor"):
        raise KeyError
    assert progress.seconds == {}


def test_partial_results_are_kept_only_by_a_subclass():
    unfinished = Unfinished()
    unfinished.put(3)
    assert unfinished.get() is None

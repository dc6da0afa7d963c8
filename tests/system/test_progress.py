"""Steps of a run: their seconds add up by name, and whoever shows them sees each part."""

from contextlib import contextmanager

import pytest

from rdoq_onnx.system.progress import Progress, Unfinished


class Shown(Progress):
    """Remembers what it was to show."""

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


def test_steps_of_one_name_share_an_entry(monkeypatch):
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


def test_nothing_unfinished_is_kept_unless_a_subclass_does():
    unfinished = Unfinished()
    unfinished.put(3)
    assert unfinished.get() is None

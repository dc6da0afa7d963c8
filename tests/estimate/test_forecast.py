"""A model with detached weights is foreseen without reading any of them, and a run says what it lacks."""

import pytest

from rdoq_onnx import pipeline
from rdoq_onnx.config import Config
from rdoq_onnx.estimate import forecast
from rdoq_onnx.estimate.dry_run import dry_run, lines
from rdoq_onnx.estimate.space import Space
from rdoq_onnx.model import external
from rdoq_onnx.system.progress import Progress
from rdoq_onnx.system.runtime import Runtime
from tests.estimate.detached import INNER, WIDTH, write_detached


@pytest.mark.parametrize("settings", [{}, {"activation_bits": None}])
def test_a_dry_run_reads_no_detached_weight(tmp_path, monkeypatch, settings):
    path = write_detached(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    session = Runtime.session

    def only_products(runtime, model, *args):
        assert model.graph.name == "product"
        return session(runtime, model, *args)

    monkeypatch.setattr(Runtime, "session", only_products)
    monkeypatch.setattr(external, "bytes_at", lambda place: pytest.fail("a weight is read"))
    found = dry_run(path, tmp_path / "calib.npz", Config(threads=1, **settings))
    assert len(found.network.layers) == 2
    assert found.seconds["rounding"] > 0
    assert found.space.scratch > 9 * 2 * WIDTH * INNER
    assert " of memory and " in [*lines(found)][-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == before


class Notes(Progress):
    def __init__(self):
        super().__init__()
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def notes_of(path):
    progress = Notes()
    pipeline.Job.of(path, path.with_name("calib.npz"), Config(threads=1), progress)
    return progress.notes


def test_a_run_says_what_it_lacks(tmp_path, monkeypatch):
    path = write_detached(tmp_path)
    monkeypatch.setattr(forecast, "space", lambda work, shelf: Space(10**15, 0))
    assert any(text.startswith("warning: the run may take") for text in notes_of(path))
    monkeypatch.setattr(forecast, "space", lambda work, shelf: 1 / 0)
    assert not any(text.startswith("warning") for text in notes_of(path))

"""Free memory of a GPU as nvidia-smi reports it, and a default where that fails."""

import subprocess

import pytest

from rdoq_onnx.system.device_memory import free_memory


def answer(monkeypatch, said):
    """Make nvidia-smi print or raise this; return the commands that are run."""
    commands = []

    def run(command, **options):
        commands.append(command)
        if isinstance(said, Exception):
            raise said
        return subprocess.CompletedProcess(command, 0, stdout=said)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_the_first_visible_device_is_queried(monkeypatch):
    commands = answer(monkeypatch, "1234\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    assert free_memory() == 1234 * 2**20
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    free_memory()
    assert [[a for a in c if a.startswith("--id")] for c in commands] == [["--id=2"], ["--id=0"]]


@pytest.mark.parametrize(
    "said", ["", "[N/A]", FileNotFoundError(), subprocess.TimeoutExpired("nvidia-smi", 30)], ids=repr
)
def test_without_an_answer_the_default_is_assumed(monkeypatch, said):
    answer(monkeypatch, said)
    assert free_memory() == 4 * 2**30

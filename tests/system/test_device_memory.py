"""Memory of a GPU as the driver's tool reports it, and a guess where there is no such tool."""

import subprocess

import pytest

from rdoq_onnx.system.device_memory import free_memory


def answer(monkeypatch, said):
    """Has nvidia-smi say so, or raise it; returns the commands that were run."""
    commands = []

    def run(command, **options):
        commands.append(command)
        if isinstance(said, Exception):
            raise said
        return subprocess.CompletedProcess(command, 0, stdout=said)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_the_first_visible_device_is_asked(monkeypatch):
    commands = answer(monkeypatch, "1234\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    assert free_memory() == 1234 * 2**20
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    free_memory()
    assert [[a for a in c if a.startswith("--id")] for c in commands] == [["--id=2"], ["--id=0"]]


@pytest.mark.parametrize(
    "said", ["", "[N/A]", FileNotFoundError(), subprocess.TimeoutExpired("nvidia-smi", 30)], ids=repr
)
def test_without_an_answer_some_memory_is_assumed(monkeypatch, said):
    answer(monkeypatch, said)
    assert free_memory() == 4 * 2**30

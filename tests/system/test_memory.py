"""How much memory a run may take: what the user says, or a share of the machine or the container."""

import os

import pytest

from rdoq_onnx.system import memory


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Give the machine 9 GiB; the files of cgroups are in the folder returned, and do not exist yet."""
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 1024, "SC_PHYS_PAGES": 9 << 20}[name])
    monkeypatch.setattr(memory, "_CGROUP", (tmp_path / "v2", tmp_path / "v1"))
    return tmp_path


def test_the_user_decides(machine):
    assert memory.memory_bound(5) == 5


def test_a_share_of_the_machine(machine):
    assert memory.machine_memory() == 9 << 30
    assert memory.memory_bound(None) == 3 << 30


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_container_may_have_less(machine, version):
    (machine / version).write_text(f"{6 << 30}\n")
    assert memory.memory_bound(None) == 2 << 30


def test_limits_that_limit_nothing(machine):
    (machine / "v2").write_text("max\n")
    (machine / "v1").write_text("9223372036854771712\n")
    assert memory.machine_memory() == 9 << 30


def test_a_system_that_does_not_tell(machine, monkeypatch):
    monkeypatch.delattr(os, "sysconf")
    assert memory.machine_memory() == 8 << 30

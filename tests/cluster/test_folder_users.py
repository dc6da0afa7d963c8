"""The processes that use a folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from rdoq_onnx.cluster.folder_users import users_of

WAIT = "import sys, time; opened = [open(path, 'w') for path in sys.argv[1:]]; print('up', flush=True); time.sleep(60)"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc on this system")
def test_processes_with_an_open_file_or_the_name_and_no_others(tmp_path):
    folder, other = tmp_path / "folder", tmp_path / "another"
    folder.mkdir()
    other.mkdir()
    (tmp_path / "link").symlink_to(folder)
    arguments = [[str(tmp_path / "link" / "file")], [str(other / "file")], [str(folder / "named")]]
    processes = [subprocess.Popen([sys.executable, "-c", WAIT, *a], stdout=subprocess.PIPE) for a in arguments]
    try:
        for process in processes:
            process.stdout.readline()
        with (folder / "own").open("w"):
            assert sorted(users_of(str(folder))) == sorted([processes[0].pid, processes[2].pid])
    finally:
        for process in processes:
            process.kill()
            process.communicate()

"""Ctrl-C ends the process once, whichever thread sees it first."""

import subprocess
import sys

TWO_THREADS = """
import threading
from rdoq_onnx.system.interrupts import AT_ONCE, leave

AT_ONCE.append(threading.Barrier(2).wait)  # both have cleaned up, and go on at the same moment
threading.Thread(target=leave, daemon=True).start()
leave()
"""


def test_two_threads_that_leave_say_it_once():
    for _ in range(5):
        ended = subprocess.run([sys.executable, "-c", TWO_THREADS], capture_output=True, text=True, timeout=60)
        assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "rdoq-onnx: interrupted\n")

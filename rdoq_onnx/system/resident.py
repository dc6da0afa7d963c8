"""How much memory a session takes: that of a process of its own, which holds nothing else.

What loading a model has freed is returned to the system first, where the C library can do that.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import onnx

from rdoq_onnx.system import io

_LIMIT = 120  # seconds
# The session must not be unmade before the memory is read.
_MEASURE = """
import contextlib
import ctypes
import os
import sys
import onnxruntime
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before = resident()
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL("libc.so.6").malloc_trim(0)
print(resident() - before)
"""


def resident_bytes(model: onnx.ModelProto) -> int | None:
    """Return the bytes that a session of `model` keeps in memory; None where the system does not tell."""
    if not Path("/proc/self/statm").exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        io.write_model(model, path)
        command = [sys.executable, "-c", _MEASURE, str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT, check=True)
            return int(done.stdout)
        except (subprocess.SubprocessError, ValueError, OSError):
            return None

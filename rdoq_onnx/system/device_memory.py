"""Free memory of a GPU, from the driver's nvidia-smi: ONNX Runtime does not report it."""

import os
import subprocess

_DEFAULT = 4 << 30  # bytes assumed free if nvidia-smi fails


def free_memory() -> int:
    """Free bytes on the first visible GPU."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = ["nvidia-smi", f"--id={first}", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, check=True, text=True, timeout=30).stdout
        return int(output.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return _DEFAULT

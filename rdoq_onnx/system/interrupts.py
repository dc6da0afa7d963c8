"""Ctrl-C: leave within a second, whatever ONNX Runtime is doing."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

INTERRUPTED = 130  # the exit code
_GRACE = 0.6  # seconds for cleanup in progress
AT_ONCE: list[Callable[[], None]] = []  # what `leave` calls: quick removal of what would stay behind
_LAST = threading.Lock()  # held by the thread that ends the process


def heed_interrupts() -> None:
    """Exit within a second of Ctrl-C even inside a long call of ONNX Runtime, where Python runs no handler."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        while signal.SIGINT not in os.read(reading, 16):
            pass
        time.sleep(_GRACE)
        leave()

    threading.Thread(target=watch, daemon=True).start()


def leave() -> None:
    """End the process, once. The main thread and the watching one may both come here."""
    for clean in AT_ONCE:
        with contextlib.suppress(Exception):  # nothing may keep it from leaving
            clean()
    # Threads of ONNX Runtime may still be busy: do not wait for them.
    with _LAST:
        sys.stderr.write("rdoq-onnx: interrupted\n")
        sys.stderr.flush()
        os._exit(INTERRUPTED)

"""The only module that runs the user's code: `--calibration module:function`."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rdoq_onnx.errors import CalibrationError, RdoqError


def call(label: str, module: str, function: str) -> Any:
    """What `function` of `module` gives, the module sought in the current folder, too.

    Raises CalibrationError for whatever goes wrong in there, also later, while feeds are taken from a generator.
    """
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        found = getattr(importlib.import_module(module), function)()
    except Exception as error:  # anything may happen in there
        raise _failure(label, error) from error
    finally:
        sys.path.remove(folder)
    return _watched(label, found) if isinstance(found, Iterator) else found


def _watched(label: str, feeds: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from feeds
    except RdoqError:
        raise
    except Exception as error:
        raise _failure(label, error) from error


def _failure(label: str, error: Exception) -> CalibrationError:
    reason = " ".join(str(error).split())
    return CalibrationError(f"{label}: failed with {type(error).__name__}: {reason}; mend it, or give a path")

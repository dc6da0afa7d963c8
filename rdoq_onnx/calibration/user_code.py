"""Run the user's code for `--calibration module:function`; no other module does."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rdoq_onnx.errors import CalibrationError, RdoqError


def call(label: str, module: str, function: str) -> Any:
    """Import `module`, from the current folder or the path, and return the result of its `function`.

    Raises CalibrationError for any error in it, including later ones while a generator yields feeds.
    """
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        result = getattr(importlib.import_module(module), function)()
    except Exception as error:  # user code may raise anything
        raise _failure(label, error) from error
    finally:
        sys.path.remove(folder)
    return _guarded(label, result) if isinstance(result, Iterator) else result


def _guarded(label: str, feeds: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from feeds
    except RdoqError:
        raise
    except Exception as error:
        raise _failure(label, error) from error


def _failure(label: str, error: Exception) -> CalibrationError:
    reason = " ".join(str(error).split())
    return CalibrationError(f"{label}: failed with {type(error).__name__}: {reason}; fix it, or give a path")

"""Run the user's code for `--calibration module:function`; no other module does."""

import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdoq_onnx.errors import RdoqError, UserCodeError

_IMPORTLIB = str(Path(importlib.__file__).parent)


def call(label: str, module: str, function: str) -> Any:
    """Import `module`, from the current folder or the path, and return the result of its `function`.

    Raises UserCodeError for any error in it, including later ones while feeds are taken from what it returned.
    """
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        result = getattr(importlib.import_module(module), function)()
    except (Exception, SystemExit) as error:  # user code may raise anything, or leave
        raise _failure(label, error) from _trimmed(error)
    finally:
        sys.path.remove(folder)
    if hasattr(result, "get_next"):
        return _guarded(label, iter(result.get_next, None))
    if not isinstance(result, Iterable) or isinstance(result, str | Path | Mapping):
        return result
    return _Guarded(label, result)


@dataclass(frozen=True)
class _Guarded:
    """Feeds whose errors are the user's."""

    label: str
    feeds: Any

    def __len__(self) -> int:
        return len(self.feeds)

    def __iter__(self) -> Iterator[Any]:
        return _guarded(self.label, self.feeds)


def _guarded(label: str, feeds: Iterable[Any]) -> Iterator[Any]:
    try:
        yield from feeds
    except RdoqError:
        raise
    except (Exception, SystemExit) as error:
        raise _failure(label, error) from _trimmed(error)


def _failure(label: str, error: BaseException) -> UserCodeError:
    reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":.;")
    return UserCodeError(f"{label}: failed with {reason}; fix it (--verbose shows where), or give a path")


def _trimmed(error: BaseException) -> BaseException:
    """Return `error` without the frames in front of the user's code: this module's and the import's."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith((__file__, "<frozen", _IMPORTLIB)):
        frames = frames.tb_next
    return error.with_traceback(frames)

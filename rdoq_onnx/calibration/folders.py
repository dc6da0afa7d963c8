"""Folders of calibration samples: images, .npy or .npz files, or ONNX's test_data_set_*/input_*.pb."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from rdoq_onnx.calibration import images
from rdoq_onnx.calibration.array_files import Spool, read_arrays, read_bytes
from rdoq_onnx.calibration.feeds import collate, model_batch
from rdoq_onnx.calibration.pixels import default_normalization
from rdoq_onnx.calibration.rows import Rows, evenly
from rdoq_onnx.calibration.samples import InputSpec
from rdoq_onnx.errors import CalibrationError

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"})
_KINDS = {"images": IMAGES, "arrays (.npy, .npz)": frozenset({".npy", ".npz"}), "tensors (.pb)": frozenset({".pb"})}


def folder_arrays(folder: Path, specs: Sequence[InputSpec], limit: int | None) -> list[dict[str, Rows]]:
    """Read the samples in `folder` and below, in path order, by shape; at most `limit` images, evenly spaced.

    Ignores other files. Raises CalibrationError, naming the file that does not fit.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    by_kind = {kind: [p for p in files if p.suffix.lower() in suffixes] for kind, suffixes in _KINDS.items()}
    kinds = [kind for kind, paths in by_kind.items() if paths]
    if not kinds:
        raise CalibrationError(f"{folder}: contains no images, .npy, .npz or .pb files; give a folder of samples")
    if len(kinds) > 1:
        raise CalibrationError(f"{folder}: contains {' and '.join(kinds)}; keep each kind in its own folder")
    pictures, arrays, tensors = by_kind.values()
    if pictures:
        return [_images(folder, pictures, specs, limit)]
    feeds = _array_feeds(folder, arrays) if arrays else _tensor_feeds(folder, tensors, [s.name for s in specs])
    return collate(str(folder), feeds, specs)


def _images(folder: Path, files: Sequence[Path], specs: Sequence[InputSpec], limit: int | None) -> dict[str, Rows]:
    """Decode to bytes [N, H, W, C]; a free height or width is that of the first image."""
    axis = images.channel_axis(specs[0]) if len(specs) == 1 else None
    if axis is None:
        inputs = ", ".join(f"{s.name!r} {list(s.shape)}" for s in specs)
        raise CalibrationError(f"{folder}: contains images, but the model takes {inputs}, not an image; give an .npz")
    shape = specs[0].shape
    channels, size = shape[axis] or 1, (shape[2], shape[3]) if axis == 1 else (shape[1], shape[2])
    picked = [files[k] for k in evenly(len(files), limit, model_batch(specs) or 1).tolist()]
    first = _decoded(picked[0], channels, size)
    with Spool(first.shape, first.dtype) as spool:
        spool.append(first[None])
        for path in picked[1:]:
            spool.append(_decoded(path, channels, first.shape[:2])[None])
        return {"images": spool.rows(), **default_normalization(channels)}


def _decoded(path: Path, channels: int, size: tuple[int | None, int | None]) -> NDArray[np.uint8]:
    try:
        return images.decode(read_bytes(path), channels, size)
    except ValueError as error:
        raise CalibrationError(f"{path}: Pillow cannot read the image ({error}); remove or convert it") from error


def _array_feeds(folder: Path, files: Iterable[Path]) -> Iterator[tuple[str, Mapping[str, Rows]]]:
    return ((str(path.relative_to(folder)), read_arrays(path)) for path in files)


def _tensor_feeds(
    folder: Path, files: Sequence[Path], names: Sequence[str]
) -> Iterator[tuple[str, Mapping[str, Rows]]]:
    """One feed per folder with input_0.pb, input_1.pb, ...: the model's inputs by position."""
    feeds: dict[Path, dict[str, Rows]] = {}
    for path in files:
        number = re.fullmatch(r"input_(\d+)", path.stem)
        if number and int(number[1]) >= len(names):
            raise CalibrationError(f"{path}: the last input of the model is input_{len(names) - 1}; remove the file")
        if number:
            feeds.setdefault(path.parent, {})[names[int(number[1])]] = _tensor(path)
    if not feeds:
        raise CalibrationError(f"{folder}: contains .pb files, but no input_0.pb; give the folder of test_data_set_0")
    return ((str(parent.relative_to(folder)), feed) for parent, feed in feeds.items())


def _tensor(path: Path) -> NDArray[Any]:
    tensor = TensorProto()
    try:
        tensor.ParseFromString(read_bytes(path))
        if tensor.data_location == TensorProto.EXTERNAL:
            raise ValueError("external data")
        return numpy_helper.to_array(tensor)
    except Exception as error:  # protobuf's DecodeError is untyped; onnx raises anything on arbitrary bytes
        reason = " ".join(str(error).split())
        raise CalibrationError(f"{path}: is not an ONNX tensor ({reason}); write it with onnx.save_tensor") from error

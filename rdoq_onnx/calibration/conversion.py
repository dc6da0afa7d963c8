"""Conversion of calibration arrays to what an input expects: images normalized, dimensions checked, dtypes cast."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.calibration.images import channel_axis
from rdoq_onnx.calibration.pixels import Pixels
from rdoq_onnx.calibration.rows import Converted, Rows
from rdoq_onnx.calibration.samples import InputSpec
from rdoq_onnx.errors import CalibrationError

Array = NDArray[Any]


def convert_input(
    label: str, rows: Rows, spec: InputSpec, extra: Mapping[str, Array], pixels: Pixels, constant: bool
) -> Rows:
    """Convert `rows` to what the model expects: images normalized, dimensions checked, values in the input's dtype."""
    where = f"{label}: {spec.name!r}"
    if holds_images(rows, spec):
        rows = _as_images(where, rows, spec, pixels.or_stored(extra))
    expected = spec.shape if constant else (None, *spec.shape[1:])
    if any(size not in (None, actual) for size, actual in zip(expected, rows.shape, strict=True)):
        raise CalibrationError(
            f"{where} has shape {shape_text(rows.shape)}, but the model expects "
            f"{shape_text(spec.shape)}; resize, crop or transpose it"
        )
    return Converted(rows, rows.shape[1:], spec.dtype, lambda block: _checked(where, block, spec.dtype))


def holds_images(rows: Rows, spec: InputSpec) -> bool:
    """Whether `rows` are image bytes, [N, H, W, C], that need converting for the model."""
    if rows.dtype != np.uint8 or len(rows.shape) != 4:
        return False
    fits = all(size in (None, n) for size, n in zip(spec.shape[1:], rows.shape[1:], strict=True))
    return spec.dtype.kind == "f" or (spec.dtype == np.uint8 and not fits)


def _as_images(where: str, rows: Rows, spec: InputSpec, pixels: Pixels | None) -> Rows:
    """Normalize bytes if `pixels` says how, and transpose to the model's axis order."""
    sample = rows.shape[1:]
    if spec.dtype.kind == "f":
        if pixels is None:
            return rows
        try:
            pixels.normalize(np.zeros((1, 1, 1, sample[2]), np.uint8))
        except ValueError as error:
            raise CalibrationError(f"{where}: {error}") from error
        rows = Converted(rows, sample, np.dtype(np.float32), pixels.normalize)
    if spec.shape[1] not in (None, sample[2]) or channel_axis(spec) == 3:
        return rows
    return Converted(rows, (sample[2], *sample[:2]), rows.dtype, lambda x: np.ascontiguousarray(np.moveaxis(x, 3, 1)))


def _checked(where: str, array: Array, dtype: np.dtype[Any]) -> Array:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        mask = "" if np.isnan(array).any() else ", or use a large finite value such as -1e4 if it is a mask"
        raise CalibrationError(f"{where} holds NaN or infinity; remove those samples{mask}")
    return _convert(where, array, dtype)


def _convert(where: str, array: Array, dtype: np.dtype[Any]) -> Array:
    """Convert `array` to `dtype` if that preserves every value, up to rounding between floats."""
    if array.dtype == dtype:
        return array
    if array.dtype.kind == dtype.kind == "f":
        with np.errstate(over="ignore"):
            converted = array.astype(dtype)
        if not np.isfinite(converted).all():
            raise CalibrationError(f"{where} holds values too large for the input's {dtype}; scale them down")
        return converted
    if array.dtype.kind not in "iu" or dtype.kind not in "iu":
        hint = ", or give --image-mean and --image-std with [N,H,W,C] images" if array.dtype == np.uint8 else ""
        raise CalibrationError(f"{where} is {array.dtype}, but the model expects {dtype}; convert it{hint}")
    low, high = int(array.min(initial=0)), int(array.max(initial=0))
    if low < np.iinfo(dtype).min or high > np.iinfo(dtype).max:
        raise CalibrationError(f"{where} ranges from {low} to {high}, too wide for the input's {dtype}; check it")
    return array.astype(dtype)


def shape_text(shape: Sequence[int | None]) -> str:
    return "[" + ",".join("?" if size is None else str(size) for size in shape) + "]"

"""Rate-distortion optimized quantization of ONNX models: each channel and activation at its own bit width.

    result = rdoq_onnx.quantize("in.onnx", calibration="calib.npz", bits=4)
    result.save("out.onnx")

`measure`, `allocate` and `emit` are its steps, e.g. for several budgets from one measurement. `compare` gives the
figures of a quantized model of any tool. Errors are in `rdoq_onnx.errors`. Names load what they need on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rdoq_onnx.errors import RdoqError
from rdoq_onnx.version import __version__

if TYPE_CHECKING:
    from rdoq_onnx.allocation.allocation import Allocation
    from rdoq_onnx.api import allocate, compare, emit, measure, quantize
    from rdoq_onnx.curves.measurement import Measurement
    from rdoq_onnx.report.report import Report
    from rdoq_onnx.report.result import Result

__all__ = [
    "Allocation",
    "Measurement",
    "RdoqError",
    "Report",
    "Result",
    "__version__",
    "allocate",
    "compare",
    "emit",
    "measure",
    "quantize",
]
_HOMES = {
    "Allocation": "allocation.allocation",
    "Measurement": "curves.measurement",
    "Report": "report.report",
    "Result": "report.result",
    **dict.fromkeys(("allocate", "compare", "emit", "measure", "quantize"), "api"),
}


def __getattr__(name: str) -> Any:
    """Load the home of a public name."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

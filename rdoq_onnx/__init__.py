"""Rate-distortion optimized quantization of ONNX models: each channel and activation at its own bit width.

    result = rdoq_onnx.quantize("in.onnx", calibration="calib.npz", bits=4)
    result.save("out.onnx")

`measure`, `allocate` and `emit` are its steps, e.g. for several budgets from one measurement. `compare` gives the
figures of a quantized model of any tool. Errors are in `rdoq_onnx.errors`.
"""

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.api import allocate, compare, emit, measure, quantize
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.errors import RdoqError
from rdoq_onnx.report.report import Report
from rdoq_onnx.report.result import Result
from rdoq_onnx.version import __version__

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

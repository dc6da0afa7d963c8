"""Load models in OpenVINO on the CPU and run them by name. The only module that imports OpenVINO, which is optional.

Float inference stays in float32; OpenVINO would use bfloat16 on CPUs that support it.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.errors import ModelError, ProviderError
from rdoq_onnx.model.external import attached
from rdoq_onnx.passes.normalization.widen_floats import float32_interface

try:
    import openvino
except ImportError:
    openvino = None


@dataclass(frozen=True)
class OpenVINO:
    """A loaded model."""

    compiled: "openvino.CompiledModel"

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the model; return the values of all outputs by name.

        Raises ModelError if the model fails on these feeds.
        """
        try:
            values = self.compiled(dict(feeds))
            # A constant passed on by Identity has the names of both.
            return {name: np.array(value) for port, value in values.items() for name in port.get_names()}
        except Exception as error:
            raise ModelError(f"OpenVINO could not run the model: {_cause(error)}") from error

    def kernels(self) -> dict[str, int]:
        """How often each kernel runs per inference, by operator and precision, as "Convolution u8"."""
        counts: dict[str, int] = {}
        for node in self.compiled.get_runtime_model().get_ordered_ops():
            info = node.get_rt_info()
            if "layerType" in info and (kind := str(info["layerType"].astype(str))) not in ("Input", "Output", "Const"):
                name = f"{kind} {info['runtimePrecision'].astype(str)}"
                counts[name] = counts.get(name, 0) + 1
        return counts


def installed() -> bool:
    """Whether OpenVINO is installed."""
    return openvino is not None


def load(model: onnx.ModelProto, threads: int = 0) -> OpenVINO:
    """Load `model` on the CPU. bfloat16 inputs and outputs are float32 for the caller.

    threads: number of inference threads; 0 lets OpenVINO choose.
    Raises ProviderError if OpenVINO is not installed, ModelError if it refuses the model.
    """
    if openvino is None:
        raise ProviderError("OpenVINO is not installed; pip install openvino")
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    try:
        core = openvino.Core()
        imported = core.read_model(io.BytesIO(float32_interface(attached(model)).SerializeToString()))
        return OpenVINO(core.compile_model(imported, "CPU", options))
    except Exception as error:  # mostly, but not always, RuntimeError
        raise ModelError(f"OpenVINO refuses the model: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    """The message on one line, without the lines that name OpenVINO's source files."""
    lines = [line.strip() for line in str(error).splitlines() if not line.startswith(("Exception from", "Check "))]
    return " ".join(filter(None, lines))[:300] or type(error).__name__

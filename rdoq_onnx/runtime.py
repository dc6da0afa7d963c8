"""The only module that imports ONNX Runtime: sessions, providers, threads.

The optimization level is always named by the caller: what is measured must not depend on a default that changes
between releases.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
from numpy.typing import NDArray

from rdoq_onnx.errors import ModelError, ProviderError

try:
    import onnxruntime as ort
except ImportError:
    ort = None

Level = Literal["none", "basic", "all"]
Feeds = Mapping[str, NDArray[Any]]

_LEVELS = {"none": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC", "all": "ORT_ENABLE_ALL"}
_FATAL_ONLY = 4


@dataclass(frozen=True)
class Session:
    """A loaded model."""

    handle: "ort.InferenceSession"

    @property
    def outputs(self) -> list[str]:
        return [o.name for o in self.handle.get_outputs()]

    def run(self, feeds: Feeds, names: Sequence[str] | None = None) -> list[NDArray[Any]]:
        """Values of the outputs `names` (all by default), in order.

        Raises ModelError if the model fails on these feeds.
        """
        try:
            values: list[NDArray[Any]] = self.handle.run(list(names) if names is not None else None, dict(feeds))
        except Exception as error:
            raise ModelError(f"ONNX Runtime could not run the model: {_first_line(error)}") from error
        return values


@dataclass(frozen=True)
class Runtime:
    """Where and how models run.

    provider: "cpu", "cuda", or "auto" (CUDA where it works, else the CPU).
    threads: threads inside an operator; 0 lets ONNX Runtime choose.

    Raises ProviderError if ONNX Runtime is not installed.
    """

    provider: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        if ort is None:
            raise ProviderError(
                "ONNX Runtime is not installed: pip install 'rdoq-onnx[cpu]', or 'rdoq-onnx[gpu]' on a CUDA machine"
            )

    @property
    def version(self) -> tuple[int, int]:
        """Major and minor version of ONNX Runtime."""
        major, minor = ort.__version__.split(".")[:2]
        return int(major), int(minor)

    @property
    def providers(self) -> list[str]:
        """Execution providers in the order of preference.

        Raises ProviderError if CUDA is asked for and this installation of ONNX Runtime has none.
        """
        cuda = "CUDAExecutionProvider" in ort.get_available_providers()
        if self.provider == "cuda" and not cuda:
            raise ProviderError(
                "--provider cuda: this ONNX Runtime has no CUDA provider; pip install 'rdoq-onnx[gpu]' "
                "after removing onnxruntime, or use --provider cpu"
            )
        if cuda and self.provider != "cpu":
            ort.preload_dlls()
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]
        return ["CPUExecutionProvider"]

    def session(self, model: onnx.ModelProto, level: Level = "basic") -> Session:
        """Load `model` at an optimization level.

        Raises ModelError if ONNX Runtime refuses the model, ProviderError if CUDA was asked for and fails to start.
        """
        return self._load(model, self._options(level))

    def optimized(self, model: onnx.ModelProto, level: Level = "basic") -> onnx.ModelProto:
        """The graph that ONNX Runtime makes of `model` at an optimization level."""
        with tempfile.TemporaryDirectory() as folder:
            options = self._options(level)
            options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
            self._load(model, options)
            return onnx.load(options.optimized_model_filepath)

    def _options(self, level: Level) -> "ort.SessionOptions":
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[level])
        options.intra_op_num_threads = self.threads
        return options

    def _load(self, model: onnx.ModelProto, options: "ort.SessionOptions") -> Session:
        providers = self.providers
        try:
            handle = ort.InferenceSession(model.SerializeToString(), options, providers=providers)
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise ModelError(f"ONNX Runtime refuses the model: {_first_line(error)}") from error
        if self.provider == "cuda" and "CUDAExecutionProvider" not in handle.get_providers():
            raise ProviderError(
                "--provider cuda: the CUDA provider does not start (driver or CUDA libraries missing); "
                "use --provider cpu"
            )
        return Session(handle)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__

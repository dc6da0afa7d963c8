"""The only module that imports ONNX Runtime: sessions, providers, threads.

The optimization level is always named by the caller: what is measured must not depend on a default that changes
between releases.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from rdoq_onnx.errors import ModelError, ProviderError, ShortageError
from rdoq_onnx.passes.normalization.widen_floats import float32_ends
from rdoq_onnx.system.device_memory import free_memory
from rdoq_onnx.system.threads import cores

try:
    import onnxruntime as ort
except ImportError:
    ort = None

Level = Literal["none", "basic", "all"]
Feeds = Mapping[str, NDArray[Any]]
BoundFeeds = Mapping[str, "NDArray[Any] | Tensor"]

_LEVELS = {"none": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC", "all": "ORT_ENABLE_ALL"}
_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
# Products in float32, not in TF32 with its 10 bits of mantissa; kernels chosen by a rule, not by a race; no more memory
# than was asked for.
_CUDA_OPTIONS = {
    "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested",
}  # fmt: skip
_ARENA = {"arena_extend_strategy": 1}  # by what is requested, not by powers of two
_FATAL_ONLY = 4
_NO_MEMORY = ("Failed to allocate memory", "out of memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class Tensor:
    """A tensor in the memory of the device that sessions run on: one that is fed to another session is not copied."""

    handle: "ort.OrtValue"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.handle.shape())

    def numpy(self) -> NDArray[Any]:
        """The values in the memory of the host, to be read; on the CPU they are where they were made."""
        value: NDArray[Any] = self.handle.numpy()
        value.flags.writeable = False
        return value


@dataclass(frozen=True)
class Session:
    """A loaded model.

    device: where its tensors are, by the name that I/O binding has for it.
    """

    handle: "ort.InferenceSession"
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def outputs(self) -> list[str]:
        return [o.name for o in self.handle.get_outputs()]

    def run(self, feeds: Feeds, names: Sequence[str] | None = None) -> list[NDArray[Any]]:
        """Values of the outputs `names` (all by default), in order.

        Raises ModelError if the model fails on these feeds.
        """
        with _failures():
            values: list[NDArray[Any]] = self.handle.run(list(names) if names is not None else None, dict(feeds))
        return values

    def bound(self, feeds: BoundFeeds, names: Sequence[str] | None = None) -> list[Tensor]:
        """As `run`, by I/O binding: values stay on the device, and feeds that are there already are not copied.

        Raises ModelError as `run` does.
        """
        wanted = self.outputs if names is None else names
        # An output that is an input would share the memory of what is fed, which may be gone before it is read.
        made = [name for name in wanted if name not in feeds]
        found = {name: self._own(feeds[name]) for name in wanted if name in feeds}
        with _failures():
            binding = self.handle.io_binding()
            for name, value in feeds.items():
                if isinstance(value, Tensor):
                    binding.bind_ortvalue_input(name, value.handle)
                else:
                    binding.bind_cpu_input(name, np.asarray(value, order="C"))
            for name in made:
                binding.bind_output(name, self.device)
            self.handle.run_with_iobinding(binding)
            found |= dict(zip(made, map(Tensor, binding.get_outputs()), strict=True))
        return [found[name] for name in wanted]

    def _own(self, value: "NDArray[Any] | Tensor") -> Tensor:
        """`value` on the device, in memory that nobody else writes to."""
        return value if isinstance(value, Tensor) else _placed(value, self.device)


@dataclass(frozen=True)
class Runtime:
    """Where and how models run.

    provider: "cpu", "cuda", or "auto" (CUDA where it works, else the CPU).
    threads: threads inside an operator; 0 lets ONNX Runtime choose, which does not see that some cores are not ours.
    shared_arena: whether sessions on the CPU take their memory from one arena of the process, which keeps it from one
    session to the next. Where many follow each other, each for a few runs, the system takes longer to provide memory
    than they take to compute.

    Raises ProviderError if ONNX Runtime is not installed.
    """

    provider: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    shared_arena: bool = False

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
        """Execution providers in the order of preference: CUDA only where a small model has run on it.

        Raises ProviderError if CUDA is asked for and does not work here.
        """
        problem = "not asked for" if self.provider == "cpu" else cuda_problem()
        if problem and self.provider == "cuda":
            raise ProviderError(f"--provider cuda: {problem}, or use --provider cpu")
        return [_CPU] if problem else [_CUDA, _CPU]

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where sessions keep their tensors. Raises ProviderError as `providers` does."""
        return "cuda" if self.providers[0] == _CUDA else "cpu"

    @property
    def in_graph(self) -> bool:
        """Whether sums over large tensors are nodes of the graph that makes these (sum_graphs.py), or left to numpy."""
        return self.device == "cuda"

    def memory(self) -> int:
        """Bytes that are free on a GPU just now; a small one's where its driver does not tell."""
        return free_memory()

    def tensor(self, value: NDArray[Any]) -> Tensor:
        """A copy of `value` on the device. Raises ShortageError if it has no room for it."""
        with _failures():
            return _placed(value, self.device)

    def session(self, model: onnx.ModelProto, level: Level = "basic") -> Session:
        """Load `model` at an optimization level; bfloat16 inputs and outputs are float32 for the caller.

        Raises ModelError if ONNX Runtime refuses the model, ProviderError as `providers` does.
        """
        return self._load(model, self._options(level), self.providers)

    def optimized(self, model: onnx.ModelProto, level: Level = "basic") -> onnx.ModelProto:
        """The graph that ONNX Runtime makes of `model` at an optimization level; no device leaves its marks on it."""
        return replace(self, provider="cpu").traced(model, level)[1]

    def traced(self, model: onnx.ModelProto, level: Level = "basic") -> tuple[Session, onnx.ModelProto]:
        """`session` and `optimized` at once, which on the CPU costs what one of them does."""
        if self.device != "cpu":
            return self.session(model, level), self.optimized(model, level)
        with tempfile.TemporaryDirectory() as folder:
            options = self._options(level)
            options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
            try:
                session = self._load(model, options, [_CPU])
            except ModelError as error:  # loaded at another level before, most likely
                raise ModelError(f"{error}; if {tempfile.gettempdir()} is full, set TMPDIR") from error
            return session, onnx.load(options.optimized_model_filepath)

    def _options(self, level: Level) -> "ort.SessionOptions":
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[level])
        ours = cores()
        options.intra_op_num_threads = self.threads or (ours if ours < (os.cpu_count() or 1) else 0)
        # Threads that wait for the next run by spinning would take the cores from numpy, which comes between two runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self.shared_arena and self.device == "cpu":
            _share_arena()
            options.add_session_config_entry("session.use_env_allocators", "1")
        return options

    def _load(self, model: onnx.ModelProto, options: "ort.SessionOptions", providers: Sequence[str]) -> Session:
        named = [(_CUDA, _CUDA_OPTIONS) if name == _CUDA else name for name in providers]
        try:
            handle = ort.InferenceSession(float32_ends(model).SerializeToString(), options, providers=named)
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise _failure("ONNX Runtime refuses the model", error) from error
        return Session(handle, "cuda" if _CUDA in providers else "cpu")


@cache
def _share_arena() -> None:
    """Make the arena of the host's memory that all sessions of this process may share."""
    where = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    with contextlib.suppress(RuntimeError):  # some releases refuse a second one: who called us may have made the first
        ort.create_and_register_allocator(where, ort.OrtArenaCfg(_ARENA))


@cache
def cuda_problem() -> str:
    """Why CUDA cannot be used, with the mend; empty if a model runs there."""
    if _CUDA not in ort.get_available_providers():
        return "this ONNX Runtime has no CUDA provider; pip install 'rdoq-onnx[gpu]' after removing onnxruntime"
    ort.preload_dlls()
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    try:
        handle = ort.InferenceSession(_one_product().SerializeToString(), options, providers=[_CUDA])
        (found,) = handle.run(None, {"x": np.full((2, 2), 3, np.float32)})
    except Exception as error:  # whatever a driver that does not fit makes of it
        return f"CUDA fails ({_first_line(error)}); mend the driver and the CUDA libraries"
    if _CUDA not in handle.get_providers() or not (found == 18).all():
        return "the CUDA provider does not start; install the driver, CUDA and cuDNN that this ONNX Runtime wants"
    return ""


def _one_product() -> onnx.ModelProto:
    """y = x x for 2 x 2 matrices."""
    value = helper.make_tensor_value_info
    x, y = (value(name, TensorProto.FLOAT, [2, 2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"])], "product", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def _placed(value: NDArray[Any], device: Literal["cpu", "cuda"]) -> Tensor:
    """A copy that ONNX Runtime owns: its view of an array's memory would not keep the array."""
    handle = ort.OrtValue.ortvalue_from_shape_and_type(value.shape, value.dtype, device)
    handle.update_inplace(np.asarray(value, order="C"))
    return Tensor(handle)


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Raises ModelError for whatever ONNX Runtime raises, ShortageError where it tells of memory."""
    try:
        yield
    except Exception as error:  # its exceptions share no base class of their own
        raise _failure("ONNX Runtime could not run the model", error) from error


def _failure(what: str, error: Exception) -> ModelError:
    if any(words in str(error) for words in _NO_MEMORY):
        return ShortageError(f"{what}: {_first_line(error)}; if that is a GPU's memory, use --provider cpu")
    return ModelError(f"{what}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__

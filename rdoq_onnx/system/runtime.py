"""Sessions, execution providers and threads of ONNX Runtime. The only module that imports it.

Callers always name the optimization level: measurements must not depend on a default that changes between releases.
"""

import contextlib
import json
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
from rdoq_onnx.model.external import is_huge, relocated, with_detached, without_detached
from rdoq_onnx.passes.normalization.widen_floats import float32_interface
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
# Products in float32, not TF32 with its 10-bit mantissa; kernels chosen by heuristics, not by timing; no more memory
# than requested.
_CUDA_OPTIONS = {
    "use_tf32": "0",
    "cudnn_conv_algo_search": "HEURISTIC",
    "arena_extend_strategy": "kSameAsRequested",
}
_ARENA = {"arena_extend_strategy": 1}  # grow by the requested size, not by powers of two
_FATAL_ONLY = 4
_KERNEL = "_kernel_time"  # suffix of the profiler's events of nodes
_FOLDER = "session.model_external_initializers_file_folder_path"
_WRITTEN = 1 << 20  # bytes of a weight that an optimized graph refers to rather than holds
_NO_MEMORY = ("Failed to allocate memory", "out of memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class Tensor:
    """A tensor in the memory of the device that sessions run on; feeding it to another session does not copy it."""

    handle: "ort.OrtValue"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.handle.shape())

    def numpy(self) -> NDArray[Any]:
        """The values as a read-only array in host memory; on the CPU this does not copy them."""
        value: NDArray[Any] = self.handle.numpy()
        value.flags.writeable = False
        return value


@dataclass(frozen=True)
class Session:
    """A loaded model.

    device: where its tensors are, by I/O binding's name for it.
    """

    handle: "ort.InferenceSession"
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def outputs(self) -> list[str]:
        return [o.name for o in self.handle.get_outputs()]

    def run(self, feeds: Feeds, names: Sequence[str] | None = None) -> list[NDArray[Any]]:
        """Run the model; return the values of the outputs `names` (all by default), in order.

        Raises ModelError if the model fails on these feeds.
        """
        with _failures():
            values: list[NDArray[Any]] = self.handle.run(list(names) if names is not None else None, dict(feeds))
        return values

    def bound(self, feeds: BoundFeeds, names: Sequence[str] | None = None) -> list[Tensor]:
        """Like `run`, with I/O binding: values stay on the device, and feeds already there are not copied.

        Raises ModelError as `run` does.
        """
        requested = self.outputs if names is None else names
        # An output that is an input would share the feed's memory, which may be freed before the output is read.
        computed = [name for name in requested if name not in feeds]
        values = {name: self._own(feeds[name]) for name in requested if name in feeds}
        with _failures():
            binding = self.handle.io_binding()
            for name, value in feeds.items():
                if isinstance(value, Tensor):
                    binding.bind_ortvalue_input(name, value.handle)
                else:
                    binding.bind_cpu_input(name, np.asarray(value, order="C"))
            for name in computed:
                binding.bind_output(name, self.device)
            self.handle.run_with_iobinding(binding)
            values |= dict(zip(computed, map(Tensor, binding.get_outputs()), strict=True))
        return [values[name] for name in requested]

    def _own(self, value: "NDArray[Any] | Tensor") -> Tensor:
        """`value` on the device, in memory of its own."""
        return value if isinstance(value, Tensor) else _placed(value, self.device)


@dataclass(frozen=True)
class Runtime:
    """Where and how models run.

    provider: "cpu", "cuda", or "auto" (CUDA where it works, else the CPU).
    threads: intra-op threads; 0 lets ONNX Runtime choose, or means the cores this process is restricted to.
    shared_arena: whether CPU sessions share one arena of the process, which keeps its memory between sessions. With
    many short-lived sessions, allocating memory anew takes longer than the computation.

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
        """Execution providers in order of preference; CUDA only if a small model has run on it.

        Raises ProviderError if CUDA is requested and does not work.
        """
        problem = "not requested" if self.provider == "cpu" else cuda_problem()
        if problem and self.provider == "cuda":
            raise ProviderError(f"--provider cuda: {problem}, or use --provider cpu")
        return [_CPU] if problem else [_CUDA, _CPU]

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where sessions keep their tensors. Raises ProviderError as `providers` does."""
        return "cuda" if self.providers[0] == _CUDA else "cpu"

    @property
    def in_graph(self) -> bool:
        """Whether sums over large tensors are computed inside the graph (gradients/sum_graph.py) or by numpy."""
        return self.device == "cuda"

    def memory(self) -> int:
        """Bytes free on the GPU right now; those of a small one if its driver does not report them."""
        return free_memory()

    def tensor(self, value: NDArray[Any]) -> Tensor:
        """Copy `value` to the device. Raises ShortageError if it does not fit."""
        with _failures():
            return _placed(value, self.device)

    def session(self, model: onnx.ModelProto, level: Level = "basic") -> Session:
        """Load `model` at an optimization level; bfloat16 inputs and outputs are float32 for the caller.

        Raises ModelError if ONNX Runtime refuses the model, ProviderError as `providers` does.
        """
        return self._load(model, self._options(level), self.providers)

    def optimized(self, model: onnx.ModelProto, level: Level = "basic") -> onnx.ModelProto:
        """Optimize the graph of `model` at a level; always on the CPU, so that the result is device-independent.

        Detached weights are inputs meanwhile: nothing is computed from them.
        """
        bare, weights = without_detached(model)
        result = replace(self, provider="cpu").traced(bare, level, weights=True)[1]
        return with_detached(result, weights)

    def traced(
        self, model: onnx.ModelProto, level: Level = "basic", weights: bool = False
    ) -> tuple[Session, onnx.ModelProto]:
        """`session` and `optimized` together; on the CPU for the cost of one.

        weights: whether the optimized graph has the values of its large weights.
        """
        if self.device != "cpu":
            return self.session(model, level), self.optimized(model, level)
        with tempfile.TemporaryDirectory() as folder:
            options = self._options(level)
            options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
            outside = () if weights else (("file_name", "weights"), ("min_size_in_bytes", str(_WRITTEN)))
            for key, value in outside:
                options.add_session_config_entry(f"session.optimized_model_external_initializers_{key}", value)
            try:
                session = self._load(model, options, [_CPU])
            except ModelError as error:  # most likely the disk, as the model loads at other levels
                raise ModelError(f"{error}; if {tempfile.gettempdir()} is full, set TMPDIR") from error
            return session, onnx.load(options.optimized_model_filepath, load_external_data=False)

    def profiled(
        self, model: onnx.ModelProto, feeds: Feeds, runs: int
    ) -> tuple[dict[str, list[float]], onnx.ModelProto]:
        """Run `model` on the CPU at its default level; return the seconds of each node in each run, and its graph then.

        Nodes are those of the optimized graph, by name; a first run warms up. Raises ModelError as `session` does.
        """
        with tempfile.TemporaryDirectory() as folder:
            options = replace(self, provider="cpu")._options("all")
            options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder, "profile"))
            session = self._load(model, options, [_CPU])
            for _ in range(runs + 1):
                session.run(feeds)
            events = json.loads(Path(session.handle.end_profiling()).read_text(encoding="utf-8"))
            optimized = onnx.load(options.optimized_model_filepath, load_external_data=False)
        seconds: dict[str, list[float]] = {}
        for event in sorted((e for e in events if e["name"].endswith(_KERNEL)), key=lambda e: float(e["ts"])):
            seconds.setdefault(event["name"].removesuffix(_KERNEL), []).append(1e-6 * float(event["dur"]))
        # A node in a loop has several events a run.
        return {name: _by_run(taken, runs + 1)[1:] for name, taken in seconds.items()}, optimized

    def _options(self, level: Level) -> "ort.SessionOptions":
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[level])
        usable = cores()  # ONNX Runtime ignores CPU affinity
        options.intra_op_num_threads = self.threads or (usable if usable < (os.cpu_count() or 1) else 0)
        # Threads that spin until the next run would take the cores from numpy, which works between two runs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self.shared_arena and self.device == "cpu":
            _share_arena()
            options.add_session_config_entry("session.use_env_allocators", "1")
        return options

    def _load(self, model: onnx.ModelProto, options: "ort.SessionOptions", providers: Sequence[str]) -> Session:
        configured = [(_CUDA, _CUDA_OPTIONS) if name == _CUDA else name for name in providers]
        try:
            shell, folder = relocated(float32_interface(model))
            if folder:
                options.add_session_config_entry(_FOLDER, folder)
            left_out = []
            if is_huge(model):  # weights stay as they are stored, with no copy in float or in the order of kernels
                options.add_session_config_entry("session.disable_prepacking", "1")
                left_out = ["ConstantFolding"]
            data = shell.SerializeToString()
            handle = ort.InferenceSession(data, options, providers=configured, disabled_optimizers=left_out)
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise _failure("ONNX Runtime refuses the model", error) from error
        return Session(handle, "cuda" if _CUDA in providers else "cpu")


def _by_run(seconds: Sequence[float], runs: int) -> list[float]:
    """Sum the seconds of a node's events over each run."""
    return [float(sum(part)) for part in np.array_split(np.asarray(seconds), runs)]


@cache
def _share_arena() -> None:
    """Create the host memory arena that sessions of this process may share."""
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    with contextlib.suppress(RuntimeError):  # some releases refuse a second arena; the caller may have created one
        ort.create_and_register_allocator(memory, ort.OrtArenaCfg(_ARENA))


@cache
def cuda_problem() -> str:
    """Why CUDA cannot be used, with the fix; empty if a model runs on it."""
    if _CUDA not in ort.get_available_providers():
        return "this ONNX Runtime has no CUDA provider; uninstall onnxruntime, then pip install 'rdoq-onnx[gpu]'"
    ort.preload_dlls()
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    try:
        handle = ort.InferenceSession(_one_product().SerializeToString(), options, providers=[_CUDA])
        (product,) = handle.run(None, {"x": np.full((2, 2), 3, np.float32)})
    except Exception as error:  # a mismatched driver may raise anything
        return f"CUDA fails ({_first_line(error)}); fix the driver and the CUDA libraries"
    if _CUDA not in handle.get_providers() or not (product == 18).all():
        return "the CUDA provider does not start; install the driver, CUDA and cuDNN that this ONNX Runtime needs"
    return ""


def _one_product() -> onnx.ModelProto:
    """y = x x for 2 x 2 matrices."""
    value = helper.make_tensor_value_info
    x, y = (value(name, TensorProto.FLOAT, [2, 2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"])], "product", [x], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def _placed(value: NDArray[Any], device: Literal["cpu", "cuda"]) -> Tensor:
    """Copy `value` to memory that ONNX Runtime owns: a view of an array's memory would not keep the array alive."""
    handle = ort.OrtValue.ortvalue_from_shape_and_type(value.shape, value.dtype, device)
    handle.update_inplace(np.asarray(value, order="C"))
    return Tensor(handle)


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Raise ModelError for any error of ONNX Runtime, ShortageError if it is out of memory."""
    try:
        yield
    except Exception as error:  # its exceptions share no base class of their own
        raise _failure("ONNX Runtime could not run the model", error) from error


def _failure(what: str, error: Exception) -> ModelError:
    if any(words in str(error) for words in _NO_MEMORY):
        return ShortageError(f"{what}: {_first_line(error)}; if a GPU is out of memory, use --provider cpu")
    return ModelError(f"{what}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__

"""How fast this machine computes what a run consists of, from computations that take some tenths of a second each."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.candidates.blocks import Blocks
from rdoq_onnx.candidates.compensation import Compensator
from rdoq_onnx.candidates.layer_rows import LayerRows
from rdoq_onnx.estimate.work import Work
from rdoq_onnx.model.linear import Linear
from rdoq_onnx.system.runtime import Feeds, Runtime, Session
from rdoq_onnx.system.threads import cores, workers

_SHAPES = 4  # of samples that are timed
_REST = 1.3  # a forward pass over the products of its layers: norms, softmax, attention
_LOAD = 0.1, 1e-9  # seconds to load a session, and for each byte of detached weights
WIDTH = 512  # of the matrices that rounding and decompositions are timed on
_WEIGHTS = 1 << 16  # that are rounded to time it
_FEW, _MANY = 4, 8  # widths of few and of many levels, which get more and fewer trials
_REPEATED = 4


@dataclass(frozen=True)
class Speeds:
    """Seconds of one operation.

    forward: a pass of the float network, per sample. load: of a session. product: a multiplication in numpy; element:
    an element that numpy copies; both by all threads together. eigen, factor: a decomposition of a second moment, and
    the factors of a compensator, per cubed width on one thread. nearest: to round one weight to nearest at one width;
    few, many: with compensation, at widths of few and of many levels; all on one thread.
    """

    threads: int
    forward: float
    load: float
    product: float
    element: float
    eigen: float
    factor: float
    nearest: float
    few: float
    many: float


def speeds(work: Work, forward: float, load: float) -> Speeds:
    """Time what is common to all networks, beside the passes of this one."""
    rng = np.random.default_rng(0)
    with workers(work.config.threads) as pool:
        threads = max(min(pool.threads, len(work.layers)), 1)
        a, b = (rng.standard_normal((WIDTH, WIDTH), np.float32) for _ in range(2))
        second = a @ a.T / WIDTH
        product = _least(lambda: a @ b) / WIDTH**3
        element = _least(lambda: np.ascontiguousarray(np.tile(a, (4, 4)).T)) / (32 * WIDTH**2)
        eigen = _least(lambda: np.linalg.eigh(second), 2) / WIDTH**3
        begin = time.thread_time()
        compensator = Compensator.of(second[None].astype(np.float64), 0.02)
        factor = (time.thread_time() - begin) / WIDTH**3
        nearest, few, many = _rounding(rng.standard_normal((_WEIGHTS // WIDTH, WIDTH), np.float32), compensator)
    return Speeds(threads, forward, load, product / threads, element / threads, eigen, factor, nearest, few, many)


def _rounding(weights: NDArray[np.float32], compensator: Compensator) -> tuple[float, float, float]:
    """Time rounding of one weight to nearest and with compensation at few and at many levels."""
    rows = LayerRows(Blocks(Linear("MatMul", weights.T.shape)), weights, 128, None)
    starts = rows.starts(compensator.hessian, (_FEW, _MANY))
    nearest = _least(lambda: rows.starts(compensator.hessian, (_FEW, _MANY)), 1) / 2
    few, many = (_least(partial(rows.rounded, compensator, {b: starts[b]}), 1) for b in (_FEW, _MANY))
    return nearest / weights.size, few / weights.size, many / weights.size


def timed_passes(model: ModelProto, samples: Samples, size: int, runtime: Runtime) -> tuple[float, float]:
    """Time passes in batches of `size`; return the seconds of a sample, and of loading `model`."""
    begin = time.perf_counter()
    session = runtime.session(model, "all")
    load, total, count = time.perf_counter() - begin, 0.0, 0
    for part in samples.of_common_shapes(_SHAPES).by_shape():
        number, feeds = next(part.counted_batches(size))
        if not count:
            session.run(feeds)  # the first run allocates
        total += len(part) * _passed(session, feeds) / number
        count += len(part)
    return total / count, load


def counted_passes(work: Work, runtime: Runtime) -> tuple[float, float]:
    """Return what `timed_passes` would, from multiplications and the time of one product of typical size."""
    if not work.layers:
        return 0.0, _LOAD[0] + _LOAD[1] * work.model
    middle = sorted(work.layers, key=lambda x: x.forward)[len(work.layers) // 2]
    inputs, outputs = (min(max(n, 16), 4096) for n in (middle.inputs, middle.channels))
    rows = min(max(middle.positions, 1) * work.observation.batching.size, 2048)
    weights = np.zeros((inputs, outputs), np.float32)
    session = runtime.session(_product((rows, inputs), (inputs, outputs)), "all")
    feeds = {"x": np.ones((rows, inputs), np.float32), "w": weights}
    took = _least(lambda: session.run(feeds), clock=time.process_time) / (runtime.threads or cores())
    one = took / (rows * inputs * outputs)
    load = _LOAD[0] + _LOAD[1] * work.model
    return _REST * one * sum(x.forward for x in work.layers), load


def _passed(session: Session, feeds: Feeds) -> float:
    """Return the seconds of a run by the clock on the wall, at most those of the processor, whose cores may be busy."""
    return min(_least(lambda: session.run(feeds), clock=clock) for clock in (time.perf_counter, time.process_time))


def _product(left: tuple[int, int], right: tuple[int, int]) -> ModelProto:
    """y = x w."""
    x, w = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", left), ("w", right)))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, (left[0], right[1]))
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "product", [x, w], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def _least(
    run: Callable[[], object], repeated: int = _REPEATED, clock: Callable[[], float] = time.thread_time
) -> float:
    """Return the least seconds of several calls, by default of this thread: others may use the machine as well."""
    taken = []
    for _ in range(repeated):
        begin = clock()
        run()
        taken.append(clock() - begin)
    return min(taken)

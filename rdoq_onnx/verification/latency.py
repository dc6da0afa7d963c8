"""Time the float and the emitted model in turns.

    ratio = median over turns of c_quantized / c_float,    c: processor seconds of a run

Other work on the machine takes the processor away from some runs for longer than they last: the ratio of their times by
the clock is then noise, and its quartiles may still lie close together. It hardly changes what a run costs in processor
seconds. Threads that wait for work spin, so with several threads they stand for the time by the clock, too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.errors import RdoqError
from rdoq_onnx.model.external import is_huge
from rdoq_onnx.system.runtime import Feeds, Runtime, Session
from rdoq_onnx.system.turns import Took, time_of, turns

_SECONDS = 0.9  # for all turns together; a turn that takes longer is the only one
_TOLERANCE = 0.05  # relative difference in time that is noise
_ONE_TURN = 0.25  # the same, of a single turn


@dataclass(frozen=True)
class Latency:
    """The time of a run with `batch` samples on the CPU.

    float_ms, quantized_ms: medians by the clock. ratio: of processor time, quantized over float; below 1 the
    emitted model is faster. spread: half the width of the median's 95 % interval; None of a single turn. busy: share of
    the time in which this process was kept from a processor; times by the clock are then upper bounds. processor_ms:
    medians of float and quantized, all threads together.
    """

    batch: int
    float_ms: float
    quantized_ms: float
    ratio: float
    spread: float | None
    busy: float = 0.0
    processor_ms: tuple[float, float] = (0.0, 0.0)

    @property
    def slower(self) -> bool:
        """Whether the emitted model is slower, by more than noise."""
        return self.ratio > 1 + max(_TOLERANCE, _ONE_TURN if self.spread is None else self.spread)


def measure_latency(
    original: onnx.ModelProto, quantized: onnx.ModelProto, samples: Samples, batch: int, runtime: Runtime
) -> tuple[Latency, ...]:
    """Time both models in ONNX Runtime on the CPU, with one sample and with `batch`; with the model's batch if fixed.

    Of samples of several shapes, those of the most common one are taken.
    Returns nothing if the CPU cannot run the models.
    """
    on_cpu = replace(runtime, provider="cpu")
    samples = samples.of_common_shapes(1)
    sizes = [samples.batch] if samples.batch else sorted({1, min(batch, len(samples))})
    try:
        if is_huge(original):
            return (_one_by_one((original, quantized), samples.feeds(slice(0, sizes[0])), sizes[0], on_cpu),)
        sessions = [on_cpu.session(model, "all") for model in (original, quantized)]
        return tuple(_timed(sessions, samples.feeds(slice(0, size)), size, _SECONDS / len(sizes)) for size in sizes)
    except RdoqError:
        return ()


def _one_by_one(models: Sequence[onnx.ModelProto], feeds: Feeds, batch: int, runtime: Runtime) -> Latency:
    """Time huge models in a session after another, as both would not fit in memory."""
    taken = []
    for model in models:
        session = runtime.session(model, "all")
        session.run(feeds)
        taken.append(time_of(lambda session=session: session.run(feeds)))  # type: ignore[misc]
        del session
    return latency_of([taken], batch)


def _timed(sessions: Sequence[Session], feeds: Feeds, batch: int, seconds: float) -> Latency:
    runs = [lambda session=session: session.run(feeds) for session in sessions]
    return latency_of(turns(runs, seconds), batch)


def latency_of(taken: Sequence[Sequence[Took]], batch: int) -> Latency:
    """Summarize turns, [turns, 2]: the float model's run and the emitted one's."""
    wall, processor = np.moveaxis(np.asarray(taken, np.float64), 2, 0)
    ratios = np.sort(processor[:, 1] / np.maximum(processor[:, 0], 1e-9))
    float_ms, quantized_ms = (1e3 * np.median(wall, axis=0)).tolist()
    busy = max(0.0, 1 - float(processor.sum() / max(wall.sum(), 1e-9)))
    spread = None if len(ratios) == 1 else float(ratios[-1 - _rank(len(ratios))] - ratios[_rank(len(ratios))]) / 2
    before, after = (1e3 * np.median(processor, axis=0)).tolist()
    return Latency(batch, float_ms, quantized_ms, float(np.median(ratios)), spread, busy, (before, after))


def _rank(count: int) -> int:
    """Return the rank, from 0, at which the 95 % interval of the median of `count` values begins.

    The number of values below the median is binomial, with mean n/2 and deviation √n/2. Of fewer than six, all of them
    make less than 95 %.
    """
    return max(0, int(count / 2 - 1.96 * math.sqrt(count) / 2))

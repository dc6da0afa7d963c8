"""Time the float and the emitted model in turns.

    ratio = median over turns of t_quantized / t_float

On a machine with nothing else to do, t is the time of a run by the clock. Other work takes the processor away from some
runs for longer than they last: ratios by the clock are then noise, and their quartiles may still lie close together. It
hardly changes what a run costs in processor seconds, so these are t on a busy machine.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.errors import RdoqError
from rdoq_onnx.model.external import is_huge
from rdoq_onnx.system.load import BUSY, Clocks
from rdoq_onnx.system.runtime import Feeds, Runtime, Session
from rdoq_onnx.system.turns import Took, run_times, time_of, turns

_SECONDS = 0.9  # for all turns together; a turn that takes longer is the only one
_TOLERANCE = 0.05  # relative difference in time that is noise
_ONE_TURN = 0.25  # the same, of a single turn


@dataclass(frozen=True)
class Latency:
    """The time of a run with `batch` samples on the CPU.

    float_ms, quantized_ms: medians, by the clock, or of processor time if the machine is `busy`. ratio: quantized over
    float; below 1 the emitted model is faster. spread: half the width of the median's 95 % interval; None of a single
    turn. others: the share of the processors' time that other work took.
    """

    batch: int
    float_ms: float
    quantized_ms: float
    ratio: float
    spread: float | None
    others: float = 0.0

    @property
    def busy(self) -> bool:
        """Whether other work makes times by the clock meaningless."""
        return self.others > BUSY

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
    begin = Clocks.now()
    try:
        if is_huge(original):
            taken = [_one_by_one((original, quantized), samples.feeds(slice(0, sizes[0])), on_cpu)]
            sizes = sizes[:1]
        else:
            sessions = [on_cpu.session(model, "all") for model in (original, quantized)]
            taken = [_in_turns(sessions, samples.feeds(slice(0, size)), _SECONDS / len(sizes)) for size in sizes]
    except RdoqError:
        return ()
    others = Clocks.now().others(begin)
    return tuple(latency_of(turns, size, others) for turns, size in zip(taken, sizes, strict=True))


def _one_by_one(models: Sequence[onnx.ModelProto], feeds: Feeds, runtime: Runtime) -> list[list[Took]]:
    """Time huge models in a session after another, as both would not fit in memory."""
    taken = []
    for model in models:
        session = runtime.session(model, "all")
        session.run(feeds)
        taken.append(time_of(lambda session=session: session.run(feeds)))  # type: ignore[misc]
        del session
    return [taken]


def _in_turns(sessions: Sequence[Session], feeds: Feeds, limit: float) -> list[list[Took]]:
    return turns([lambda session=session: session.run(feeds) for session in sessions], limit)  # type: ignore[misc]


def latency_of(taken: Sequence[Sequence[Took]], batch: int, others: float) -> Latency:
    """Summarize turns, [turns, 2]: the float model's run and the emitted one's."""
    times = run_times(taken, others > BUSY)
    ratios = np.sort(times[:, 1] / np.maximum(times[:, 0], 1e-9))
    float_ms, quantized_ms = (1e3 * np.median(times, axis=0)).tolist()
    rank = _rank(len(ratios))
    spread = None if len(ratios) == 1 else float(ratios[-1 - rank] - ratios[rank]) / 2
    return Latency(batch, float_ms, quantized_ms, float(np.median(ratios)), spread, others)


def _rank(count: int) -> int:
    """Return the rank, from 0, at which the 95 % interval of the median of `count` values begins.

    The number of values below the median is binomial, with mean n/2 and deviation √n/2. Of fewer than six, all of them
    make less than 95 %.
    """
    return max(0, int(count / 2 - 1.96 * math.sqrt(count) / 2))

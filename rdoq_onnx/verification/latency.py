"""Time the float and the emitted model in turns, so that whatever else slows the machine slows both alike.

ratio = median over turns of t_quantized / t_float
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.errors import RdoqError
from rdoq_onnx.model.external import is_huge
from rdoq_onnx.system.runtime import Feeds, Runtime, Session
from rdoq_onnx.system.turns import seconds_of, turns

_SECONDS = 0.9  # for all turns together; a turn that takes longer is the only one


@dataclass(frozen=True)
class Latency:
    """The time of a run with `batch` samples on the CPU: medians in milliseconds.

    ratio: quantized over float; below 1 the emitted model is faster. spread: half the interquartile range of the
    turns' ratios; 0 of a single turn.
    """

    batch: int
    float_ms: float
    quantized_ms: float
    ratio: float
    spread: float


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
        taken.append(seconds_of(lambda session=session: session.run(feeds)))  # type: ignore[misc]
        del session
    return latency_of([taken], batch)


def _timed(sessions: Sequence[Session], feeds: Feeds, batch: int, seconds: float) -> Latency:
    runs = [lambda session=session: session.run(feeds) for session in sessions]
    return latency_of(turns(runs, seconds), batch)


def latency_of(taken: Sequence[Sequence[float]], batch: int) -> Latency:
    """Summarize the seconds of turns, [turns, 2]: the float model's and the emitted one's."""
    seconds = np.asarray(taken, np.float64)
    ratios = seconds[:, 1] / np.maximum(seconds[:, 0], 1e-9)
    first, middle, third = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    float_ms, quantized_ms = (1e3 * np.median(seconds, axis=0)).tolist()
    return Latency(batch, float_ms, quantized_ms, middle, (third - first) / 2)

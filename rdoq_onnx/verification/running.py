"""What a model takes while it runs: memory, and for a decoder with caches the tokens that it writes in a second.

A decoder reads a sample first; what it leaves in its caches is read back with one more token, time after time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.errors import RdoqError
from rdoq_onnx.system.four_bits import four_bits
from rdoq_onnx.system.load import BUSY, Clocks
from rdoq_onnx.system.resident import resident_bytes
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.turns import run_times, turns

Array = NDArray[Any]
Share = float
_SECONDS = 2.0


@dataclass(frozen=True)
class Footprint:
    """Bytes that a session keeps in memory, and tokens a second at batch 1; None if unknown."""

    memory: int | None
    tokens: float | None


@dataclass(frozen=True)
class Running:
    """Of the float model, the emitted one, and the file of ONNX Runtime's own 4-bit quantizer if it can be made.

    others: share of the processors' time that other work took; on a machine so busy, seconds are those of processors.
    """

    float: Footprint
    emitted: Footprint
    four_bits: Footprint | None
    others: Share = 0.0


def measure_running(original: onnx.ModelProto, emitted: onnx.ModelProto, samples: Samples, runtime: Runtime) -> Running:
    """Measure the models on the CPU."""
    other = four_bits(original)
    models = (original, emitted) if other is None else (original, emitted, other)
    rates, others = _tokens(models, samples, runtime)
    before, after, *rest = map(Footprint, map(resident_bytes, models), rates)
    return Running(before, after, rest[0] if rest else None, others)


def _tokens(
    models: Sequence[onnx.ModelProto], samples: Samples, runtime: Runtime
) -> tuple[Sequence[float | None], float]:
    """Return the tokens a second of each model, the first of which is in float, and what other work took meanwhile."""
    on_cpu = replace(runtime, provider="cpu")
    names = [o.name for o in models[0].graph.output]
    unknown, begin = ([None] * len(models), 0.0), Clocks.now()
    try:
        sessions = [on_cpu.session(model, "all") for model in models]
        first = samples.of_common_shapes(1).feeds(slice(0, 1))
        feeds = next_feeds(first, dict(zip(names, sessions[0].run(first, names), strict=True)))
        if feeds is None:
            return unknown
        taken = turns([lambda session=session: session.run(feeds) for session in sessions], _SECONDS)  # type: ignore[misc]
    except RdoqError:
        return unknown
    others = Clocks.now().others(begin)
    return [1 / max(each, 1e-9) for each in np.median(run_times(taken, others > BUSY), axis=0).tolist()], others


def next_feeds(feeds: Mapping[str, Array], outputs: Mapping[str, Array]) -> dict[str, Array] | None:
    """Return what a decoder reads with the next token; None if it has no caches, or inputs of unknown meaning."""
    caches: dict[str, Array] = {}
    for name, value in outputs.items():
        for past in ("past", "past_key_values"):
            if name.replace("present", past) in feeds.keys() - {name}:
                caches[name.replace("present", past)] = value
    made: dict[str, Array] = {}
    for name, value in feeds.items():
        if name in caches:
            made[name] = caches[name]
        elif name == "input_ids":
            made[name] = value[:, -1:]
        elif name == "attention_mask":
            made[name] = np.concatenate([value, np.ones_like(value[:, :1])], axis=1)
        elif name == "position_ids":
            made[name] = value[:, -1:] + 1
        elif name == "past_sequence_length":
            made[name] = value + feeds["input_ids"].shape[1]
        elif name in ("total_sequence_length", "seqlens_k"):
            made[name] = value + 1
        else:
            return None
    return made if caches else None

"""The wording of figures in progress, table, page and hints."""

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.analysis.patterns import as_pattern
from rdoq_onnx.analysis.skips import Skip
from rdoq_onnx.system.load import BUSY
from rdoq_onnx.verification.latency import Latency
from rdoq_onnx.verification.running import Running
from rdoq_onnx.version import __version__

# Shown names of steps whose own names, which the JSON report and the curves file hold, are internal.
_STEP_NAMES = {
    "moments": "input statistics",
    "sensitivity": "gradient statistics",
    "taylor": "sensitivities",
    "taylor, activations": "activation sensitivities",
    "doubtful": "exact checks",
    "ties": "anchoring",
    "second look": "refinement",
}
_PIN = re.compile(r"--pin (?:'[^']*?=|[^\s=]+=)")
_READER = re.compile(r"where .* reads it$")


def step_name(name: str) -> str:
    """Return the shown name of a step."""
    return _STEP_NAMES.get(name, name)


def count_widths(bits: NDArray[np.int64]) -> dict[int, int]:
    widths, counts = np.unique(bits, return_counts=True)
    return {int(w): int(n) for w, n in zip(widths, counts, strict=True)}


def pin_of(name: str, bits: float) -> str:
    """Return the option that pins the layer or activation `name`, quoted for a shell."""
    return f"--pin {shlex.quote(f'{as_pattern(name)}={round(bits)}')}"


def skip_lines(skips: Iterable[Skip], each: bool) -> Iterator[str]:
    """Word why nodes stay in float; unless `each`, nodes with the same reason, but for a name, share a line."""
    groups: dict[str, list[Skip]] = {}
    for skip in skips:
        groups.setdefault(_nameless(skip.reason), []).append(skip)
    for reason, several in groups.items():
        if each or len(several) == 1:
            yield from (f"{s.op_type} {s.node}: {s.reason}" for s in several)
        else:
            kinds = ", ".join(sorted({s.op_type for s in several}))
            yield f"{kinds}, {len(several)} nodes: {reason}"


def kept_lines(kept: Mapping[str, Sequence[tuple[int, str]]], each: bool) -> Iterator[str]:
    """Word why 0-bit channels stay, by layer node; unless `each`, layers with the same reason share a line."""
    groups: dict[str, Counter[str]] = {}
    for node, several in kept.items():
        for _, reason in several:
            groups.setdefault(reason if each else _nameless(reason), Counter())[node] += 1
    for reason, nodes in groups.items():
        if each or len(nodes) == 1:
            yield from (f"{count} of {node}: {reason}" for node, count in nodes.items())
        else:
            yield f"{nodes.total()} in {len(nodes)} layers: {reason}"


def _nameless(reason: str) -> str:
    """Leave out the names in which reasons of one kind differ."""
    return _READER.sub("where another layer reads it", _PIN.sub("--pin TENSOR=", reason))


def decibels(before: float, after: float) -> str:
    """Word the gain in distortion, positive if `after` is the smaller one."""
    return f"{10 * math.log10(before / after):+.2f} dB" if before > 0 and after > 0 else "0 dB"


def percent(share: float) -> str:
    """Word a share with three digits; 0 % below 0.001 %."""
    return f"{100 * share:.3g} %" if share >= 1e-5 else "0 %"


def histogram(counts: Mapping[int, int]) -> str:
    """Word the number at each width, as "3: 74, 4: 102"."""
    return ", ".join(f"{bits}: {n}" for bits, n in counts.items())


def human_bytes(count: int) -> str:
    """Word a file size in kB or MB, powers of 1000."""
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def about_bytes(count: int) -> str:
    """Word an estimated size with two digits, in MB or GB, powers of 1000."""
    value, unit = (count / 1e9, "GB") if count >= 0.995e9 else (count / 1e6, "MB")
    return f"{value:.1f} {unit}" if value < 9.95 else f"{float(f'{value:.2g}'):,.0f} {unit}"


def times(seconds: Mapping[str, float]) -> str:
    """Word the time of a run, and of each step that takes at least 2 % of it."""
    total = sum(seconds.values())
    steps = ", ".join(f"{step_name(name)} {s:.1f}" for name, s in seconds.items() if s >= total / 50)
    return f"{total:.1f} s: {steps}"


def duration(seconds: float) -> str:
    """Word an estimated time in seconds or minutes."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def time_of_run(latency: Latency) -> tuple[str, str]:
    """Word the time of a run, and how it compares with the float model's."""
    spread = "" if latency.spread is None else f" ± {max(latency.spread, 0.01):.2f}"
    ratio = f"{latency.ratio:.2f}{spread} times the float model's {milliseconds(latency.float_ms)}"
    if not latency.busy:
        return milliseconds(latency.quantized_ms), ratio
    return milliseconds(latency.quantized_ms), f"{ratio}, of processor time{_busy(latency.others)}"


def _busy(others: float) -> str:
    return f", as other work takes {100 * others:.0f} % of the processors here"


def latency_rows(latency: Sequence[Latency], running: Running | None = None) -> list[tuple[str, str]]:
    """Word times, memory and tokens a second as rows of the summary."""
    rows = [(f"latency, batch of {x.batch}", ", ".join(time_of_run(x))) for x in latency]
    return rows if running is None else rows + _running_rows(running)


def _running_rows(running: Running) -> list[tuple[str, str]]:
    """Word the memory and the tokens a second of the emitted model beside those of others."""
    others = {"the float model": running.float, "ONNX Runtime's 4-bit quantizer": running.four_bits}
    known = {name: each for name, each in others.items() if each is not None}
    rows = []
    if running.emitted.memory is not None:
        sizes = [f"{name} {human_bytes(each.memory)}" for name, each in known.items() if each.memory is not None]
        rows.append(("memory of a session", "; ".join([human_bytes(running.emitted.memory), *sizes])))
    if running.emitted.tokens is not None:
        rates = [f"{name} {each.tokens:.3g}" for name, each in known.items() if each.tokens is not None]
        busy = [f"of processor time{_busy(running.others)}"] if running.others > BUSY else []
        rows.append(("tokens a second", "; ".join([f"{running.emitted.tokens:.3g} at batch 1", *rates, *busy])))
    return rows


def milliseconds(value: float) -> str:
    """Word a time with three digits."""
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"


def integer_kernels(kernels: Mapping[str, int]) -> dict[str, int]:
    """Keep the operators that compute with integers."""
    return {op: n for op, n in kernels.items() if op.startswith(("QLinear", "QGemm")) or "Integer" in op}


def kernel_words(kernels: Mapping[str, int]) -> str:
    """Count the integer kernels by operator, "none" without any."""
    return ", ".join(f"{n} {op}" for op, n in integer_kernels(kernels).items()) or "none"


def finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None


def failed_document(source: str, output: str, reason: str) -> str:
    """Write the document of `--json` for a budget that could not be met."""
    document = {"version": __version__, "input": source, "output": output, "passed": False, "reason": reason}
    return json.dumps(document, indent=2) + "\n"

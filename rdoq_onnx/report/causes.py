"""Name causes of a poor or doubtful result that more bits and better curves do not cure, one line each."""

from statistics import median

import numpy as np

from rdoq_onnx.allocation.allocation import Allocation
from rdoq_onnx.analysis.patterns import pins
from rdoq_onnx.config import MAX_BITS, Config
from rdoq_onnx.model.graph import Graph, upstream
from rdoq_onnx.observation.parts import SELECTORS
from rdoq_onnx.report.report import Report
from rdoq_onnx.report.wording import pin_of

FEW = 16  # held-out samples below which figures are rough
_ALIKE = 0.5  # likeness (verification/likeness.py); sentences of one genre have 0.37 to 0.46, of several 0.65 to 0.76
_MAIN = 0.5  # share of the distortion that makes something its main cause
_FAR_DB = 10.0  # a part so far below the median of the others is pointed out


def few_samples(report: Report) -> list[str]:
    """Point out figures that rest on few held-out samples."""
    if report.held_out >= FEW:
        return []
    count = "1 held-out sample" if report.held_out == 1 else f"{report.held_out} held-out samples"
    return [f"figures rest on {count}, so they are rough: calibrate on more samples ({report.samples} now)"]


def alike(report: Report) -> list[str]:
    """Point out held-out samples that are too like those seen to tell anything of others."""
    if report.likeness is None or report.likeness >= _ALIKE:
        return []
    return [
        "the held-out samples are much like those calibrated on (their outputs are "
        f"{report.likeness:.2f} of the mean squared distance apart), so these figures promise little for others: "
        "calibrate on more varied samples"
    ]


def pinned(allocation: Allocation, config: Config) -> list[str]:
    """Name the pinned layer or activation that causes most of the predicted distortion."""
    total, bits, curves = allocation.predicted, allocation.bits, allocation.measurement.curves
    for pattern, width in config.pins:
        for unit in (u for u in allocation.measurement.units() if pins(pattern, u.names)):
            rows, own = unit.rows, float(allocation.distortions[unit.rows].sum())
            offered = np.flatnonzero(np.isfinite(curves.distortion[rows]).all(axis=0))
            wider = offered[offered > bits[rows].min()]
            if own < _MAIN * total or not len(wider):
                continue
            left = {b: total - own + float(curves.distortion[rows, b].sum()) for b in wider.tolist()}
            best = next((b for b in left if left[b] <= _MAIN * total), max(left))
            return [
                f"{unit.kind} {unit.name}, pinned to {bits_word(width)}, causes {100 * own / total:.0f} % of the "
                f"distortion: {pin_of(unit.name, best)} leaves {100 * left[best] / total:.0f} % of the total"
            ]
    return []


def bits_word(width: int) -> str:
    """Word a width."""
    return "1 bit" if width == 1 else f"{width} bits"


def selected(allocation: Allocation) -> list[str]:
    """Point out outputs whose rows are selected by value, so that a figure of them compares different rows."""
    measurement = allocation.measurement
    pieces = [p for part in measurement.observation.metric.parts for p in part.pieces if p.kind == "selected"]
    producer = Graph(measurement.network.model).producer
    values: dict[str, list[str]] = {}
    for piece in pieces:
        values.setdefault(piece.output, []).append(piece.value)
    lines = []
    for output, sources in values.items():
        found = [n.op_type for n in upstream([output], producer) if n.op_type in SELECTORS][-1]
        lines.append(
            f"output {output} holds rows that {found} selects by value: a small error swaps them, and then no figure "
            f"compares like with like; the distortion is that of {', '.join(sources[:3])}, before the selection: judge "
            f"{output} by the metric of its task"
        )
    return lines


def weak_part(allocation: Allocation, report: Report) -> list[str]:
    """Point out a part of the outputs that is far worse than the others, with the layer that makes it."""
    if len(report.parts) < 2:
        return []
    worst, *better = sorted(report.parts, key=lambda part: part.sqnr_db)
    others = median(part.sqnr_db for part in better)
    if worst.sqnr_db > others - _FAR_DB:
        return []
    network = allocation.measurement.network
    layers = {use.node: layer for layer in network.layers for use in layer.uses}
    makers = [layers[n.name] for n in upstream([worst.name], Graph(network.model).producer) if n.name in layers]
    where = f"output {worst.name}" if worst.name == worst.output else f"{worst.name}, part of output {worst.output},"
    fix = f": give the layer that makes it more bits, e.g. {pin_of(makers[-1].name, MAX_BITS)}" if makers else ""
    return [f"{where} has {worst.sqnr_db:.1f} dB where the others have {others:.1f} dB{fix}"]

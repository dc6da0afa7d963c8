"""The table of layers and activations in the HTML report: what each costs, loses and spans, and how to pin it."""

import math
from collections.abc import Iterator

from rdoq_onnx.report.costs import amount
from rdoq_onnx.report.html_table import table
from rdoq_onnx.report.result import Result
from rdoq_onnx.report.wording import pin_of
from rdoq_onnx.verification.value_ranges import Range

_COLUMNS = ("name", "kind", "channels", "bits", "input bits", "output SQNR", "float range", "quantized range")
_DISTORTION = ("δ predicted", "δ alone", "share")


def layer_table(result: Result) -> str:
    """Build a row for each layer and activation, with the option that pins its width."""
    cost = () if result.report.cost is None else ("cost",)
    head = (*_COLUMNS, *_DISTORTION, *cost, "pin")
    return table(head, [*_layers(result), *_activations(result)], code=len(head) - 1, name="layers")


def _layers(result: Result) -> Iterator[tuple[str, ...]]:
    details, priced = result.details, result.report.cost
    for k, (layer, rows) in enumerate(zip(result.report.layers, result.curves.unit_rows(), strict=True)):
        own = float(result.allocation.distortions[rows].sum())
        cost = () if priced is None else (amount(layer.cost or 0.0, priced.unit),)
        yield (
            layer.name,
            layer.op,
            str(len(layer.bits)),
            f"{layer.mean_bits:.2f}",
            "float" if layer.activation_bits is None else str(layer.activation_bits),
            _decibels(layer.sqnr_db),
            *(("", "") if details is None else map(_span, details.ranges.layers[k])),
            *_shares(result, own, None if details is None else details.alone.layers[k]),
            *cost,
            pin_of(layer.name, layer.mean_bits),
        )


def _activations(result: Result) -> Iterator[tuple[str, ...]]:
    details, measurement = result.details, result.curves
    cost = () if result.report.cost is None else ("",)
    units = zip(measurement.network.activations, result.allocation.activation_bits, strict=True)
    for k, (activation, bits) in enumerate(units):
        own = float(result.allocation.distortions[measurement.channels + k])
        yield (
            activation.tensor,
            "extra 8-bit tensor" if activation.fusion else "activation",
            "",
            str(bits),
            "",
            "",
            *(("", "") if details is None else map(_span, details.ranges.activations[k])),
            *_shares(result, own, None if details is None else details.alone.activations[k]),
            *cost,
            "" if activation.fusion else pin_of(activation.tensor, bits),
        )


def _shares(result: Result, own: float, alone: float | None) -> tuple[str, str, str]:
    """Word a unit's distortion: predicted, measured alone, and as a share of the total."""
    total = max(result.allocation.predicted, 1e-300)
    return f"{own:.3g}", "" if alone is None else f"{alone:.3g}", f"{100 * own / total:.1f} %"


def _decibels(value: float | None) -> str:
    return "" if value is None else "exact" if math.isinf(value) else f"{value:.1f} dB"


def _span(ends: Range) -> str:
    return f"{ends[0]:.3g} to {ends[1]:.3g}"

"""Write a Result as one self-contained HTML page, with plotly and all data inside."""

import html
import json
import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import plotly.io
import plotly.offline

from rdoq_onnx.allocation.frontier import Frontier, frontiers
from rdoq_onnx.emission.emit import METADATA
from rdoq_onnx.report import figures
from rdoq_onnx.report.costs import amount
from rdoq_onnx.report.html_page import PAGE
from rdoq_onnx.report.result import Result
from rdoq_onnx.report.wording import against_float, human_bytes, milliseconds, percent, pin_of
from rdoq_onnx.version import __version__

_PACKAGES = ("numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "onnx-ad", "onnx-graphsurgeon", "openvino")
_SIDES = {"weights": "Weights", "activations": "Activations", "both": "Weights and activations"}


def html_report(result: Result, output: str, command: str = "") -> str:
    """Build the page. output: path of the emitted model; command: the command line of the run."""
    traced = frontiers(result.allocation, result.config.budgets)
    plots = {_id(f): figures.frontier(f) for f in traced}
    plots |= {"map": figures.channel_map(result), "shares": figures.shares(result)}
    plots |= {"histogram": figures.histogram(result), "sizes": figures.sizes(result)}
    check = figures.additivity(result)
    if check is not None:
        plots["additivity"] = check
    data = ",".join(f"{json.dumps(name)}:{plotly.io.to_json(plot)}" for name, plot in plots.items())
    parts = {
        "TITLE": html.escape(result.report.input.rpartition("/")[2] or "model"),
        "PATHS": f"{html.escape(result.report.input or 'a model in memory')} → {html.escape(output)}",
        "VERSION": html.escape(__version__),
        "CARDS": _cards(result),
        "ADVICE": _advice(result),
        "FRONTIERS": "".join(
            f"<figure><h3>{_SIDES[f.side] if f.unit is None else 'Cost'}</h3><div id='{_id(f)}'></div></figure>"
            for f in traced
        ),
        "ADDITIVITY": _additivity(result),
        "LAYERS": _layers(result),
        "FLOAT": _float(result),
        "SETTINGS": _pairs(_settings(result)),
        "VERSIONS": _pairs(_versions()),
        "COMMAND": f"<pre>{html.escape(command)}</pre>" if command else "",
        # A "</script>" within the data would end the script.
        "FIGURES": "{" + data.replace("</", "<\\/") + "}",
        "PLOTLY": plotly.offline.get_plotlyjs(),
    }
    return re.sub("@([A-Z]+)@", lambda slot: parts[slot[1]], PAGE)  # in one pass: values may contain an @NAME@


def _id(frontier: Frontier) -> str:
    return f"frontier-{frontier.side if frontier.unit is None else 'cost'}"


def _cards(result: Result) -> str:
    report = result.report
    activations = "float" if report.activation_bits is None else f"{report.activation_bits:.2f}"
    cards = [
        (f"{report.sqnr_db:.2f} dB", "output SQNR", f"on {report.held_out} held-out samples"),
        (f"{report.weight_bits:.2f}", "bits per weight", f"{report.weight_elements:,} weights"),
        (activations, "bits per activation element", f"{report.activation_elements:,} elements per sample"),
        (
            human_bytes(report.output_bytes),
            "file",
            f"from {human_bytes(report.input_bytes)}, {report.input_bytes / max(report.output_bytes, 1):.1f} × smaller",
        ),
        (f"{report.measured:.3g}", "measured distortion δ", f"{report.predicted:.3g} predicted"),
        (percent(report.optimality_gap), "optimality gap at most", "of the predicted distortion"),
        *(() if report.cost is None else (report.cost.card(),)),
        *((milliseconds(x.quantized_ms), f"a batch of {x.batch}", against_float(x)) for x in report.latency),
    ]
    return "".join(
        f"<div class='card'><b>{html.escape(value)}</b><span>{name}</span><small>{html.escape(aside)}</small></div>"
        for value, name, aside in cards
    )


def _advice(result: Result) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in result.report.advice)
    return f"<section><h2>Hints</h2><ul>{items}</ul></section>" if items else ""


def _additivity(result: Result) -> str:
    alone, report = result.alone, result.report
    if alone is None:
        return "<p>Not measured in this run.</p>"
    total = sum(alone.layers) + sum(alone.activations)
    rows = [
        ("predicted sum Σδ", report.predicted, "first-order curves, anchored to exact runs at few bits"),
        ("measured sum Σδ", total, f"each layer and activation alone, on {alone.samples} held-out samples"),
        ("measured at once", report.measured, f"the emitted model, on {report.held_out} held-out samples"),
    ]
    cells = "".join(f"<tr><td>{a}</td><td class='n'>{b:.4g}</td><td>{c}</td></tr>" for a, b, c in rows)
    return f"<table>{cells}</table><div id='additivity'></div>"


def _layers(result: Result) -> str:
    """Build a row for each layer and activation, with the option that pins its width."""
    measurement, distortions = result.curves, result.allocation.distortions
    total, alone, priced = max(result.allocation.predicted, 1e-300), result.alone, result.report.cost
    none = () if priced is None else ("",)
    lines = []
    for k, (layer, rows) in enumerate(zip(result.report.layers, measurement.unit_rows(), strict=True)):
        own = float(distortions[rows].sum())
        fed = "float" if layer.activation_bits is None else str(layer.activation_bits)
        exact = f"{alone.layers[k]:.3g}" if alone else ""
        lines.append(
            (
                layer.name,
                layer.op,
                str(len(layer.bits)),
                f"{layer.mean_bits:.2f}",
                fed,
                f"{own:.3g}",
                exact,
                f"{100 * own / total:.1f} %",
                *([] if priced is None else [amount(layer.cost or 0.0, priced.unit)]),
                pin_of(layer.name, layer.mean_bits),
            )
        )
    units = zip(measurement.network.activations, result.allocation.activation_bits, strict=True)
    for k, (activation, bits) in enumerate(units):
        own = float(distortions[measurement.channels + k])
        exact = f"{alone.activations[k]:.3g}" if alone else ""
        kind, pin = ("extra 8-bit tensor", "") if activation.fusion else ("activation", pin_of(activation.tensor, bits))
        share = f"{100 * own / total:.1f} %"
        lines.append((activation.tensor, kind, "", str(bits), "", f"{own:.3g}", exact, share, *none, pin))
    columns = ("name", "kind", "channels", "bits", "input bits", "δ predicted", "δ alone", "share")
    head = (*columns, *(() if priced is None else ("cost",)), "pin")
    return _table(head, lines, code=len(head) - 1)


def _float(result: Result) -> str:
    report = result.report
    lines = [(s.node, s.op_type, f"left in float: {s.reason}") for s in report.skipped]
    lines += [(node, "", f"integer weights, float kernel: {why}") for node, why in report.float_layers.items()]
    lines += [(tensor, "", f"measured exactly: {why}") for tensor, why in report.probed.items()]
    lines += [(t, "", "extra 8-bit tensor, outside the budget, to fuse kernels") for t in report.fusion_tensors]
    for node, several in report.kept_channels.items():
        counts = Counter(why for _, why in several)
        lines += [(node, "", f"{count} 0-bit channels kept: {why}") for why, count in counts.items()]
    if not lines:
        return "<p>Nothing: every layer runs on integers.</p>"
    return _table(("node or tensor", "operator", "note"), lines)


def _settings(result: Result) -> dict[str, str]:
    stored = {p.key: p.value for p in result.model.metadata_props}
    settings: dict[str, Any] = json.loads(stored.get(f"{METADATA}.settings", "{}"))
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in sorted(settings.items())}


def _versions() -> dict[str, str]:
    versions = {"rdoq-onnx": __version__, "Python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _pairs(values: Mapping[str, str]) -> str:
    return _table((), values.items(), code=1)


def _table(head: Iterable[str], lines: Iterable[Iterable[str]], code: int | None = None) -> str:
    """Build a table. code: the column to show as code, for copying."""
    top = "".join(f"<th>{h}</th>" for h in head)
    top = f"<thead><tr>{top}</tr></thead>" if top else ""
    body = "".join(
        "<tr>"
        + "".join(
            f"<td><code>{html.escape(c)}</code></td>" if k == code and c else f"<td>{html.escape(c)}</td>"
            for k, c in enumerate(line)
        )
        + "</tr>"
        for line in lines
    )
    return f"<div class='scroll'><table>{top}<tbody>{body}</tbody></table></div>"

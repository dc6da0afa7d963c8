"""One run on the HTML page: its sections, and the data of its plots."""

import html
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import plotly.io

from rdoq_onnx.allocation.frontier import Frontier, frontiers
from rdoq_onnx.emission.emit import METADATA
from rdoq_onnx.report import figures
from rdoq_onnx.report.html_layers import layer_table
from rdoq_onnx.report.html_page import RUN
from rdoq_onnx.report.html_table import table
from rdoq_onnx.report.report import Report
from rdoq_onnx.report.result import Result
from rdoq_onnx.report.wording import human_bytes, percent, time_of_run

_OPTION = re.compile(r"(--[a-z][a-z0-9-]*)((?: [^\s(,]*[^\s(,;:.])?)")  # and its value
_SIDES = {"weights": "Weights", "activations": "Activations", "both": "Weights and activations"}


@dataclass(frozen=True)
class Run:
    """A run as the page shows it: HTML and the plots in it, as JSON by the name of their element.

    budget: the text that it was given as. output: path of the emitted model.
    """

    budget: str
    output: str
    report: Report
    body: str
    plots: Mapping[str, str]


def html_run(result: Result, output: str, budget: str = "", number: int | None = None) -> Run:
    """Write a run. number: that of the run among several on the page, None if it is the only one."""
    traced = frontiers(result.allocation, result.config.budgets)
    before = "" if number is None else f"run{number}-"
    plots = {_id(f): figures.frontier(f) for f in traced}
    plots |= {"map": figures.channel_map(result), "shares": figures.shares(result)}
    plots |= {"histogram": figures.histogram(result), "sizes": figures.sizes(result)}
    plots |= {"layers": figures.layer_outputs(result.report)}
    if result.details is not None:
        plots |= {"additivity": figures.additivity(result, result.details.alone)}
    parts = {
        "CARDS": _cards(result),
        "ADVICE": _advice(result),
        "FRONTIERS": "".join(
            f"<figure><h3>{_SIDES[f.side] if f.unit is None else 'Cost'}</h3><div id='{before}{_id(f)}'></div></figure>"
            for f in traced
        ),
        "OUTPUTS": f"<div id='{before}layers'></div>",
        "ADDITIVITY": _additivity(result, before),
        "LAYERS": layer_table(result),
        "FLOAT": _float(result.report),
        "SETTINGS": table((), _settings(result).items(), code=1),
        "BEFORE": before,
    }
    body = re.sub("@([A-Z]+)@", lambda slot: parts[slot[1]], RUN)  # in one pass: values may contain an @NAME@
    return Run(budget, output, result.report, body, {before + k: plotly.io.to_json(v) for k, v in plots.items()})


def _id(frontier: Frontier) -> str:
    return f"frontier-{frontier.side if frontier.unit is None else 'cost'}"


def _cards(result: Result) -> str:
    report = result.report
    activations = "float" if report.activation_bits is None else f"{report.activation_bits:.2f}"
    kept = "" if report.agreement is None else f", {percent(report.agreement.share)} keep their top class"
    cards = [
        (f"{report.sqnr_db:.2f} dB", "output SQNR", f"on {report.held_out} held-out samples{kept}"),
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
        *((time, f"a batch of {x.batch}", aside) for x in report.latency for time, aside in [time_of_run(x)]),
    ]
    return "".join(
        f"<div class='card'><b>{html.escape(value)}</b><span>{name}</span><small>{html.escape(aside)}</small></div>"
        for value, name, aside in cards
    )


def _advice(result: Result) -> str:
    items = "".join(f"<li>{_coded(line)}</li>" for line in result.report.advice)
    return f"<section><h2>Hints</h2><ul>{items}</ul></section>" if items else ""


def _coded(line: str) -> str:
    """Write the options in a line, and their values, as code whose names do not break at hyphens."""
    pieces = list(map(html.escape, _OPTION.split(line)))
    names = (f"<code><span>{name}</span>{value}</code>" for name, value in zip(pieces[1::3], pieces[2::3], strict=True))
    return "".join(text + code for text, code in zip_longest(pieces[::3], names, fillvalue=""))


def _additivity(result: Result, before: str) -> str:
    report = result.report
    if result.details is None:
        return "<p>Not measured in this run.</p>"
    alone = result.details.alone
    total = sum(alone.layers) + sum(alone.activations)
    rows = [
        ("predicted sum Σδ", report.predicted, "first-order curves, anchored to exact runs at few bits"),
        ("measured sum Σδ", total, f"each layer and activation alone, on {alone.samples} held-out samples"),
        ("measured at once", report.measured, f"the emitted model, on {report.held_out} held-out samples"),
    ]
    return table((), [(a, f"{b:.4g}", c) for a, b, c in rows]) + f"<div id='{before}additivity'></div>"


def _float(report: Report) -> str:
    lines = [(s.node, s.op_type, f"left in float: {s.reason}") for s in report.skipped]
    lines += [(node, "", f"integer weights, float kernel: {why}") for node, why in report.float_layers.items()]
    lines += [(tensor, "", f"measured exactly: {why}") for tensor, why in report.probed.items()]
    lines += [(t, "", "extra 8-bit tensor, outside the budget, to fuse kernels") for t in report.fusion_tensors]
    for node, several in report.kept_channels.items():
        counts = Counter(why for _, why in several)
        lines += [(node, "", f"{count} 0-bit channels kept: {why}") for why, count in counts.items()]
    if not lines:
        return "<p>Nothing: every layer runs on integers.</p>"
    return table(("node or tensor", "operator", "note"), lines, name="float")


def _settings(result: Result) -> dict[str, str]:
    stored = {p.key: p.value for p in result.model.metadata_props}
    settings: dict[str, Any] = json.loads(stored.get(f"{METADATA}.settings", "{}"))
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in sorted(settings.items())}

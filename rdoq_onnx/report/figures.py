"""Plot a run: Result -> plotly figures. The page sets the colours of text and grid for light and dark."""

import html
import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from rdoq_onnx.allocation.frontier import Frontier
from rdoq_onnx.config import MAX_BITS
from rdoq_onnx.report.report import Report
from rdoq_onnx.report.result import Result
from rdoq_onnx.verification.additivity import Alone

WEIGHTS, ACTIVATIONS, UNIFORM, CHOSEN = "#4c8dff", "#f2a03d", "#9aa3b2", "#e5484d"
# One colour per width, 0 to 8 bits: grey for removed channels, then cold to warm.
WIDTHS = ("#8b93a1", "#3b2f8f", "#3d5fc4", "#2f8fc9", "#27b0a5", "#5fc66b", "#b6d444", "#f5cd3a", "#f58a2f")
_ROW = 256  # maximum channels in a row of the map; larger layers take several rows
_NAMED = 40  # maximum layers whose names fit on an axis
_SHOWN = 26  # maximum characters of a name on an axis
_DECADES = 5  # maximum decades of a logarithmic axis that are labelled
_FEW_DECADES = 1.7  # those between whose labels others fit


def frontier(data: Frontier) -> go.Figure:
    """Plot predicted distortion over average bits, or over a cost."""
    points = [p for p in data.points if p.distortion > 0]
    uniform = [p for p in data.uniform if p.distortion > 0]
    rate = "%{x:.2f} bits" if data.unit is None else f"%{{x:.4s}} {html.escape(data.unit)}"
    hover = f"{rate}, δ %{{y:.3g}}<extra>%{{fullData.name}}</extra>"
    colour = ACTIVATIONS if data.side == "activations" else WEIGHTS
    traces = [
        go.Scatter(
            x=[p.bits for p in points],
            y=[p.distortion for p in points],
            name="mixed widths",
            mode="lines",
            line={"color": colour, "width": 2.5},
            hovertemplate=hover,
        ),
        go.Scatter(
            x=[p.bits for p in uniform],
            y=[p.distortion for p in uniform],
            name="one width everywhere",
            mode="markers+lines",
            line={"color": UNIFORM, "dash": "dot"},
            marker={"size": 8, "symbol": "square"},
            hovertemplate=hover,
        ),
        go.Scatter(
            x=[data.chosen.bits],
            y=[data.chosen.distortion],
            name="this run",
            mode="markers",
            marker={"color": CHOSEN, "size": 14, "symbol": "star"},
            hovertemplate=hover,
        ),
    ]
    kind = "element" if data.side == "both" else "weight" if data.side == "weights" else "activation element"
    return _figure(
        traces,
        360,
        xaxis={"title": f"average bits per {kind}" if data.unit is None else html.escape(data.unit or "cost")},
        yaxis={"title": "predicted distortion δ", **_log([p.distortion for p in (*points, *uniform)])},
    )


def budgets(runs: Sequence[tuple[str, Report]]) -> go.Figure:
    """Plot the measured SQNR of several runs over the size of their files, each labelled with its budget."""
    ordered = sorted(runs, key=lambda run: run[1].output_bytes)
    trace = go.Scatter(
        x=[report.output_bytes / 1000 for _, report in ordered],
        y=[report.sqnr_db if math.isfinite(report.sqnr_db) else None for _, report in ordered],
        text=[html.escape(budget) for budget, _ in ordered],
        mode="lines+markers+text",
        textposition="top center",
        cliponaxis=False,
        line={"color": WEIGHTS, "width": 2.5},
        marker={"size": 9},
        hovertemplate="budget %{text}: %{x:,.1f} kB, %{y:.2f} dB<extra></extra>",
    )
    return _figure([trace], 340, xaxis={"title": "file, kB"}, yaxis={"title": "output SQNR, dB"}, showlegend=False)


def layer_outputs(report: Report) -> go.Figure:
    """Plot the SQNR of each layer's output, in graph order, with that of the model's output."""
    names, decibels = [layer.name for layer in report.layers], [layer.sqnr_db for layer in report.layers]
    known = [(k, db) for k, db in enumerate(decibels) if db is not None and math.isfinite(db)]
    x = [k for k, _ in known]
    traces = [
        go.Scatter(
            x=x,
            y=[db for _, db in known],
            name="output of the layer",
            mode="lines+markers",
            line={"color": WEIGHTS, "width": 2},
            marker={"size": 7},
            customdata=[html.escape(names[k]) for k in x],
            hovertemplate="%{customdata}<br>%{y:.1f} dB<extra></extra>",
        )
    ]
    if math.isfinite(report.sqnr_db):
        traces.append(
            go.Scatter(
                x=[0, len(names) - 1],
                y=[report.sqnr_db] * 2,
                name="output of the model",
                mode="lines",
                line={"color": CHOSEN, "dash": "dash", "width": 1.5},
                hovertemplate="%{y:.1f} dB<extra>%{fullData.name}</extra>",
            )
        )
    return _figure(traces, 400, xaxis=_layer_axis(names), yaxis={"title": "SQNR, dB"})


def channel_map(result: Result) -> go.Figure:
    """Map the width of every channel: one or more rows per layer, its channels sorted by width."""
    layers, rows = result.report.layers, result.curves.unit_rows()
    distortions = result.allocation.distortions
    across = min(_ROW, max(len(layer.bits) for layer in layers))
    names: list[str] = []
    ticks: list[tuple[int, str]] = []
    cells: list[np.ndarray] = []
    spaced = any(len(layer.bits) > across for layer in layers)
    for layer, part in zip(layers, rows, strict=True):
        bits = np.array(layer.bits)
        order = np.argsort(-bits, kind="stable")
        table = np.stack([bits[order], order, distortions[part][order]], axis=1)
        lines = -(-len(bits) // across)
        padded = np.full((lines * across, 3), np.nan)
        padded[: len(bits)] = table
        ticks.append((len(names), _short(layer.name)))
        suffixes = [f" ({k + 1} of {lines})" if lines > 1 else "" for k in range(lines)]
        names += [html.escape(layer.name) + suffix for suffix in suffixes]
        cells.append(padded.reshape(lines, across, 3))
        if spaced:
            names.append(" " * len(names))
            cells.append(np.full((1, across, 3), np.nan))
    values = np.concatenate(cells).astype(np.float32)
    scale = [(edge, colour) for k, colour in enumerate(WIDTHS) for edge in (k / len(WIDTHS), (k + 1) / len(WIDTHS))]
    trace = go.Heatmap(
        z=values[:, :, 0],
        y=names,
        customdata=values[:, :, 1:],
        hoverongaps=False,
        xgap=0.5 if across <= 80 else 0,
        ygap=1,
        zmin=-0.5,
        zmax=MAX_BITS + 0.5,
        colorscale=scale,
        colorbar={"title": {"text": "bits"}, "tickvals": list(range(MAX_BITS + 1)), "thickness": 14, "outlinewidth": 0},
        hovertemplate="%{y}<br>channel %{customdata[0]}: %{z} bits, δ %{customdata[1]:.3g}<extra></extra>",
    )
    height = max(220, 90 + len(names) * (18 if len(names) <= _NAMED else 9 if len(names) <= 120 else 6))
    step = max(1, -(-len(ticks) * 13 // height))
    shown = ticks[::step]
    return _figure(
        [trace],
        height,
        xaxis={"title": "channels, widest first", "showgrid": False, "zeroline": False},
        yaxis={
            "autorange": "reversed",
            "type": "category",
            "showgrid": False,
            "tickvals": [names[k] for k, _ in shown],
            "ticktext": [name for _, name in shown],
            "tickfont": {"size": 11},
        },
    )


def shares(result: Result) -> go.Figure:
    """Plot each layer's share of the bits, and its share and its input activation's share of the distortion."""
    measurement, allocation = result.curves, result.allocation
    distortions = allocation.distortions
    parts = measurement.unit_rows()
    names = [layer.name for layer in result.report.layers]
    spent = [float(allocation.spent[p].sum()) / 8000 for p in parts]
    activations = [a.tensor for a in measurement.network.activations]
    own = distortions[measurement.channels :]
    total = max(allocation.predicted, 1e-300)
    labels = [html.escape(n) for n in names]
    in_front = {f: k for k, a in enumerate(measurement.network.activations) for f in a.feeds}
    # An activation that feeds several layers is shown at the first.
    first: dict[int, int] = {}
    for j, layer in enumerate(measurement.network.layers):
        k = in_front.get(layer.uses[0].data)
        if k is not None:
            first.setdefault(k, j)
    fed: dict[int, int] = {j: k for k, j in first.items()}
    feeding = [100 * float(own[fed[j]]) / total if j in fed else 0.0 for j in range(len(names))]
    feeders = [html.escape(activations[fed[j]]) if j in fed else "" for j in range(len(names))]
    x = list(range(len(names)))
    traces = [
        go.Bar(
            x=x,
            y=spent,
            name="size of weights",
            marker={"color": WEIGHTS},
            yaxis="y",
            customdata=labels,
            hovertemplate="%{customdata}<br>%{y:.3g} kB of weights<extra></extra>",
        ),
        go.Bar(
            x=x,
            y=[100 * float(distortions[p].sum()) / total for p in parts],
            name="distortion of weights",
            marker={"color": CHOSEN},
            yaxis="y2",
            customdata=labels,
            hovertemplate="%{customdata}<br>weights: %{y:.3g} % of the distortion<extra></extra>",
        ),
        go.Bar(
            x=x,
            y=feeding,
            name="distortion of the input activation",
            marker={"color": ACTIVATIONS},
            yaxis="y2",
            customdata=feeders,
            hovertemplate="%{customdata}<br>%{y:.3g} % of the distortion<extra></extra>",
        ),
    ]
    return _figure(
        traces,
        520,
        barmode="stack",
        bargap=0.15,
        xaxis={"anchor": "y2", **_layer_axis(names)},
        yaxis={"domain": [0.55, 1], "title": "kB of weights"},
        yaxis2={"domain": [0, 0.45], "title": "% of distortion"},
    )


def additivity(result: Result, alone: Alone) -> go.Figure:
    """Plot predicted against measured distortion of each layer and activation alone, and of all at once."""
    report = result.report
    measurement, distortions = result.curves, result.allocation.distortions
    weights = [float(distortions[p].sum()) for p in measurement.unit_rows()]
    activations = distortions[measurement.channels :].tolist()
    hover = "%{customdata}<br>predicted δ %{x:.3g}, measured %{y:.3g}<extra></extra>"
    groups = (
        ("layers", WEIGHTS, weights, alone.layers, [layer.name for layer in report.layers], 8, "circle"),
        (
            "activations",
            ACTIVATIONS,
            activations,
            alone.activations,
            [a.tensor for a in measurement.network.activations],
            8,
            "diamond",
        ),
        (
            "sum, each alone",
            UNIFORM,
            [report.predicted],
            [sum(alone.layers) + sum(alone.activations)],
            ["sum over all, each quantized alone"],
            12,
            "square",
        ),
        ("all at once", CHOSEN, [report.predicted], [report.measured], ["the emitted model"], 15, "star"),
    )
    kept = [(n, c, *_positive(x, y, names), size, symbol) for n, c, x, y, names, size, symbol in groups]
    ends = [v for _, _, x, y, *_ in kept for v in (*x, *y)] or [1.0]
    line = [min(ends) / 1.5, max(ends) * 1.5]
    traces = [
        go.Scatter(
            x=line,
            y=line,
            mode="lines",
            line={"color": UNIFORM, "dash": "dash", "width": 1},
            name="predicted = measured",
            hoverinfo="skip",
        )
    ]
    traces += [
        go.Scatter(
            x=x,
            y=y,
            mode="markers",
            name=name,
            customdata=[html.escape(t) for t in names],
            marker={"color": colour, "size": size, "symbol": symbol, "opacity": 0.9},
            hovertemplate=hover,
        )
        for name, colour, x, y, names, size, symbol in kept
        if x
    ]
    axis = {**_log(line), "range": [math.log10(v) for v in line]}
    return _figure(traces, 440, xaxis={**axis, "title": "predicted δ"}, yaxis={**axis, "title": "measured δ"})


def histogram(result: Result) -> go.Figure:
    """Plot the shares of weights and of activation elements at each width."""
    measurement, bits = result.curves, result.allocation.bits
    elements, first = measurement.curves.elements, measurement.channels
    budgeted = [first + k for k, a in enumerate(measurement.network.activations) if not a.fusion]
    widths = list(range(MAX_BITS + 1))
    traces = []
    for name, colour, rows in (("weights", WEIGHTS, list(range(first))), ("activations", ACTIVATIONS, budgeted)):
        if rows:
            counts = [len(np.flatnonzero(bits[rows] == w)) for w in widths]
            filled = [float(elements[rows][bits[rows] == w].sum()) for w in widths]
            unit = "channels" if name == "weights" else "tensors"
            traces.append(
                go.Bar(
                    x=widths,
                    y=[100 * f / max(sum(filled), 1) for f in filled],
                    name=name,
                    marker={"color": colour},
                    customdata=counts,
                    hovertemplate=f"%{{x}} bits: %{{y:.1f}} % of {name}, %{{customdata}} {unit}<extra></extra>",
                )
            )
    x, y = {"title": "bits", "dtick": 1, "showgrid": False}, {"title": "% of elements"}
    return _figure(traces, 360, barmode="group", bargap=0.25, xaxis=x, yaxis=y)


def sizes(result: Result) -> go.Figure:
    """Plot the bytes of the file before and after, and of the weights at their widths."""
    report = result.report
    names = ["weight data", "after", "before"]
    values = [report.payload_bits / 8000, report.output_bytes / 1000, report.input_bytes / 1000]
    trace = go.Bar(
        x=values,
        y=names,
        orientation="h",
        marker={"color": [UNIFORM, WEIGHTS, ACTIVATIONS]},
        text=[f"{v:,.1f} kB" for v in values],
        textposition="auto",
        hovertemplate="%{y}: %{x:,.1f} kB<extra></extra>",
    )
    return _figure([trace], 220, xaxis={"title": "kB"}, yaxis={"showgrid": False}, showlegend=False)


def _positive(
    x: Sequence[float], y: Sequence[float], names: Sequence[str]
) -> tuple[list[float], list[float], list[str]]:
    """Select the points that logarithmic axes can show."""
    kept = [(a, b, n) for a, b, n in zip(x, y, names, strict=True) if a > 0 and b > 0]
    return [a for a, _, _ in kept], [b for _, b, _ in kept], [n for _, _, n in kept]


def _log(values: Sequence[float]) -> dict[str, object]:
    """Make a logarithmic axis, labelled at some decades if it spans many, else at 1, 2 and 5 as well."""
    decades = math.log10(max(values) / min(values)) if values else 0.0
    step = math.ceil(decades / _DECADES) if decades > _FEW_DECADES else "D2"
    return {"type": "log", "exponentformat": "power", "dtick": step}


def _layer_axis(names: Sequence[str]) -> dict[str, object]:
    """Make an axis of layers in graph order, with their names if these fit."""
    few = len(names) <= _NAMED
    return {
        "tickvals": list(range(len(names))) if few else None,
        "ticktext": [_short(n) for n in names] if few else None,
        "tickangle": -50 if few else 0,
        "title": "" if few else "layers, in graph order",
        "showgrid": False,
    }


def _short(name: str) -> str:
    return html.escape(name if len(name) <= _SHOWN else "…" + name[-_SHOWN:])


def _figure(traces: Sequence[go.Scatter], height: int, **layout: object) -> go.Figure:
    for axis in ("xaxis", "yaxis", "yaxis2"):
        if isinstance(options := layout.get(axis), dict):
            layout[axis] = {"automargin": True, **options}
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"}
    margin = {"l": 10, "r": 10, "t": 54, "b": 10}
    return go.Figure(traces, {"template": None, "height": height, "legend": legend, "margin": margin, **layout})

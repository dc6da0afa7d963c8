"""Draw the charts of README and the table of docs/comparisons.md from the rows of bench_comparisons.py."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import plotly.graph_objects as go
from bench_additivity import draw as render
from plotly.subplots import make_subplots
from targets import ROOT

DOCS = ROOT / "docs"
NAMES = {"resnet20": "ResNet-20", "mobilenet_v2": "MobileNet-v2"}
TECHNIQUES = {"aimet+seqmse": "SeqMSE", "aimet+adaround": "AdaRound"}
TOOLS = {"rdoq-onnx": "circle", "onnxruntime": "square", "nncf": "diamond", "aimet": "triangle-up"}
THEMES = {
    "light": {"text": "#3d4554", "grid": "#dfe3ea", "tools": ("#0b62d6", "#9a5b00", "#7a3fb5", "#5d6675")},
    "dark": {"text": "#c3cad6", "grid": "#343b48", "tools": ("#6db3ff", "#f0a63c", "#c99bff", "#98a2b3")},
}
TITLES = {
    "onnxruntime": "ONNX Runtime",
    "nncf": "NNCF",
    "aimet": "AIMET-ONNX",
    "modelopt": "ModelOpt",
    "quark": "Quark",
    "inc": "onnx-neural-compressor",
    "olive": "Olive",
}
WIDTH, HEIGHT = 820, 360
Rows = Sequence[dict[str, str]]


def figure(rows: Rows, theme: str) -> go.Figure:
    """Plot SQNR over file size, a panel for each network."""
    colours, made = THEMES[theme], [r for r in rows if not r["failure"] and "A" in r["setting"]]
    plot = make_subplots(1, len(NAMES), subplot_titles=list(NAMES.values()), horizontal_spacing=0.1)
    for column, model in enumerate(NAMES, 1):
        for (tool, symbol), colour in zip(TOOLS.items(), colours["tools"], strict=True):
            own = sorted((r for r in made if r["model"] == model and family(r) == tool), key=lambda r: int(r["bytes"]))
            plot.add_scatter(
                row=1,
                col=column,
                x=[int(r["bytes"]) / 1e3 for r in own],
                y=[float(r["sqnr_db"]) for r in own],
                text=[label(r) for r in own],
                textposition="middle left" if tool == "aimet" else "top center",  # it lies close to ONNX Runtime
                cliponaxis=False,
                mode="markers+lines+text" if tool == "rdoq-onnx" else "markers+text",
                name=TITLES.get(tool, tool),
                showlegend=column == 1,
                marker={"color": colour, "symbol": symbol, "size": 9},
                line={"color": colour, "width": 1.5},
                textfont={"size": 10, "color": colour},
            )
    axis = {"gridcolor": colours["grid"], "zerolinecolor": colours["grid"], "linecolor": colours["grid"]}
    plot.update_xaxes(**axis, title="file, kB", rangemode="tozero")
    plot.update_yaxes(**axis)
    plot.update_yaxes(title="output SQNR, dB", col=1)
    plot.update_annotations(font={"size": 14, "color": colours["text"]})
    plot.update_layout(
        template=None,
        width=WIDTH,
        height=HEIGHT,
        font={"color": colours["text"], "size": 12},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 55, "r": 10, "t": 40, "b": 80},
        legend={"orientation": "h", "y": -0.22},
    )
    return plot


def family(row: Mapping[str, str]) -> str:
    return row["tool"].split("+")[0]


def label(row: Mapping[str, str]) -> str:
    return " ".join([row["setting"], *filter(None, [TECHNIQUES.get(row["tool"])])])


def table(rows: Rows) -> str:
    """Return the rows as a Markdown table; one of a tool that failed says why."""
    lines = ["| model | tool | setting | SQNR dB | top-1 (float) | kB | seconds |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        tool = f"{TITLES.get(family(r), family(r))} {r['version']}"
        if r["failure"]:
            reason = r["failure"].replace("|", "\\|").replace("<", "&lt;")
            lines.append(f"| {r['model']} | {tool} | {label(r)} | fails: {reason} | | | |")
            continue
        top1 = f"{r['top1']} ({r['float_top1']})" if r["top1"] else "–"
        size = f"{int(r['bytes']) / 1e3:,.0f}"
        lines.append(f"| {r['model']} | {tool} | {label(r)} | {r['sqnr_db']} | {top1} | {size} | {r['seconds']} |")
    return "\n".join(lines)


def draw(rows: Rows) -> None:
    """Write docs/chart-light.svg, docs/chart-dark.svg and the table between the marks of docs/comparisons.md."""
    for theme in THEMES:
        render(figure(rows, theme), Path(DOCS, f"chart-{theme}.svg"), WIDTH, HEIGHT)
    page = DOCS / "comparisons.md"
    marks = r"(<!-- table -->\n).*?(<!-- end of table -->)"
    page.write_text(re.sub(marks, lambda m: f"{m[1]}\n{table(rows)}\n\n{m[2]}", page.read_text(), flags=re.DOTALL))

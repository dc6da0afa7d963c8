"""Whether distortions add up (Eq. 6): predicted sum, sum of each part measured alone, and all at once.

    python tests/benchmarks/bench_additivity.py [--samples N] [--effort fast|default|best] [--svg FILE]

Each row is one run on a model of models/ at one budget for weights and activations. All but the prediction is measured
on held-out samples. --svg plots the rows with plotly in Chromium.
"""

import argparse
import base64
import re
import subprocess
import tempfile
from pathlib import Path

import plotly.graph_objects as go
import plotly.offline
from tables import write
from targets import ROOT

from rdoq_onnx import pipeline
from rdoq_onnx.config import Config, Effort
from rdoq_onnx.system.progress import Progress

BUDGETS = (2.0, 3.0, 4.0, 5.0, 6.0)
SIZES = (-12, 6, 12, 12, 12, 16, 16)
COLOURS = {"digits_cnn": "#4c8dff", "digits_vit": "#f2a03d"}

Row = tuple[str, float, float, float, float]


def rows(samples: int, effort: Effort) -> list[Row]:
    write(("model", "bits", "predicted", "each alone", "at once", "alone/predicted", "at once/alone"), SIZES)
    results = []
    for name in COLOURS:
        for bits in BUDGETS:
            config = Config(weight_bits=bits, activation_bits=bits, samples=samples, effort=effort, threads=1)
            paths = (ROOT / "models" / f"{name}.onnx", ROOT / "models" / "digits_calib.npz")
            result = pipeline.Job.of(*paths, config, Progress()).result(config, details=True)
            assert result.details is not None
            each = result.details.alone
            alone = sum(each.layers) + sum(each.activations)
            predicted, measured = result.report.predicted, result.report.measured
            figures = [f"{v:.4g}" for v in (predicted, alone, measured)]
            ratios = [f"{alone / predicted:.2f}", f"{measured / alone:.2f}"]
            write((name, f"{bits:g}", *figures, *ratios), SIZES)
            results.append((name, bits, predicted, alone, measured))
    return results


def figure(results: list[Row]) -> go.Figure:
    ends = [min(min(row[2:]) for row in results) / 1.5, max(max(row[2:]) for row in results) * 1.5]
    line = go.Scatter(x=ends, y=ends, mode="lines", name="equal", line={"dash": "dash", "width": 1, "color": "#9aa3b2"})
    plot = go.Figure([line])
    for name, colour in COLOURS.items():
        own = [row for row in results if row[0] == name]
        for column, kind, symbol in ((3, "each alone", "circle-open"), (4, "all at once", "star")):
            plot.add_scatter(
                x=[r[2] for r in own],
                y=[r[column] for r in own],
                mode="markers",
                name=f"{name}, {kind}",
                marker={"color": colour, "symbol": symbol, "size": 9},
            )
    axis = {"type": "log", "dtick": 1, "exponentformat": "power", "gridcolor": "#d9dee6", "linecolor": "#9aa3b2"}
    plot.update_layout(
        template=None,
        width=640,
        height=420,
        font={"color": "#6b7486"},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 60, "r": 10, "t": 10, "b": 50},
        xaxis={**axis, "title": "predicted δ"},
        yaxis={**axis, "title": "measured δ"},
    )
    return plot


def draw(plot: go.Figure, path: Path, width: int = 640, height: int = 420) -> None:
    """Render `plot` as SVG in Chromium."""
    script = f"const f = {plot.to_json()}; Plotly.toImage(f, {{format: 'svg', width: {width}, height: {height}}})"
    page = f"<script>{plotly.offline.get_plotlyjs()}</script><script>{script}.then(url => document.body.textContent = "
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "page.html")
        source.write_text(f"<meta charset=utf-8><body>{page}'SVG ' + btoa(unescape(url.split(',')[1])))</script>")
        command = ["chromium", "--headless=new", "--no-sandbox", "--virtual-time-budget=9000", "--dump-dom"]
        done = subprocess.run([*command, f"--user-data-dir={folder}", source.as_uri()], capture_output=True, text=True)
    svg = re.search(r"SVG ([A-Za-z0-9+/=]+)", done.stdout)
    if svg is None:
        raise RuntimeError("Chromium drew nothing")
    path.write_bytes(base64.b64decode(svg[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=120)
    parser.add_argument("--effort", default="default")
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    results = rows(options.samples, options.effort)
    if options.svg is not None:
        draw(figure(results), options.svg)


if __name__ == "__main__":
    main()

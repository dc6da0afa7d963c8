"""Write one or several runs as one self-contained HTML page, with plotly and all data inside."""

import html
import json
import math
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

import plotly.io
import plotly.offline

from rdoq_onnx.report import figures
from rdoq_onnx.report.html_page import PAGE
from rdoq_onnx.report.html_run import Run, html_run
from rdoq_onnx.report.html_script import SCRIPT
from rdoq_onnx.report.html_table import breakable, table
from rdoq_onnx.report.result import Result
from rdoq_onnx.report.wording import human_bytes
from rdoq_onnx.version import __version__

_PACKAGES = ("numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "onnx-ad", "onnx-graphsurgeon", "openvino")
_BUDGETS = ("budget", "SQNR", "file", "weight bits", "activation bits", "δ predicted", "δ measured", "model")
_FACTS = len(_BUDGETS) - 2


def html_report(result: Result, output: str, command: str = "") -> str:
    """Build the page of one run. output: path of the emitted model; command: the command line of the run."""
    return html_page([html_run(result, output)], command)


def html_page(runs: Sequence[Run], command: str = "", failures: Mapping[str, str] | None = None) -> str:
    """Build the page of `runs` of one model: of several, the one shown is chosen by a tab.

    failures: the budgets that could not be met, with the reason.
    """
    several = len(runs) > 1 or bool(failures)
    plots = {name: data for run in runs for name, data in run.plots.items()}
    if len(runs) > 1:
        plots["budgets"] = plotly.io.to_json(figures.budgets([(run.budget, run.report) for run in runs]))
    source = runs[0].report.input if runs else ""
    outputs = "several models" if several else runs[0].output
    data = ",".join(f"{json.dumps(name)}:{plot}" for name, plot in plots.items())
    parts = {
        "TITLE": html.escape(source.rpartition("/")[2] or "model"),
        "PATHS": f"{breakable(html.escape(source or 'a model in memory'))} → {breakable(html.escape(outputs))}",
        "VERSION": html.escape(__version__),
        "BUDGETS": _budgets(runs, failures or {}) if several else "",
        "RUNS": "".join(_tab(k, run) for k, run in enumerate(runs)),
        "VERSIONS": table((), _versions().items(), code=1),
        "COMMAND": f"<pre>{_words(command)}</pre>" if command else "",
        # A "</script>" within the data would end the script.
        "FIGURES": "{" + data.replace("</", "<\\/") + "}",
        "PLOTLY": plotly.offline.get_plotlyjs(),
        "SCRIPT": SCRIPT,
    }
    return re.sub("@([A-Z]+)@", lambda slot: parts[slot[1]], PAGE)  # in one pass: values may contain an @NAME@


def _words(command: str) -> str:
    """Write a command line whose words do not break at hyphens."""
    return " ".join(f"<span>{html.escape(word)}</span>" for word in command.split(" "))


def _budgets(runs: Sequence[Run], failures: Mapping[str, str]) -> str:
    """Compare the runs, with a tab for each."""
    rows = [(r.budget, *_facts(r), r.output if r.report.passed else f"none: {r.report.reason}") for r in runs]
    rows += [(budget, *[""] * _FACTS, f"none: {reason}") for budget, reason in failures.items()]
    plot = "<div id='budgets'></div>" if len(runs) > 1 else ""
    tabs = "".join(f"<button type='button' data-tab='{k}'>{html.escape(r.budget)}</button>" for k, r in enumerate(runs))
    compared = f"<section><h2>Budgets</h2>{plot}{table(_BUDGETS, rows, name='budgets')}</section>"
    return f"{compared}<nav aria-label='Budget shown below'><span>Budget</span>{tabs}</nav>"


def _facts(run: Run) -> tuple[str, ...]:
    report = run.report
    activations = "float" if report.activation_bits is None else f"{report.activation_bits:.2f}"
    sqnr = f"{report.sqnr_db:.2f} dB" if math.isfinite(report.sqnr_db) else "exact"
    size, weights = human_bytes(report.output_bytes), f"{report.weight_bits:.2f}"
    return sqnr, size, weights, activations, f"{report.predicted:.4g}", f"{report.measured:.4g}"


def _tab(number: int, run: Run) -> str:
    return f"<article data-run='{number}'{' hidden' if number else ''}>{run.body}</article>"


def _versions() -> dict[str, str]:
    versions = {"rdoq-onnx": __version__, "Python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions

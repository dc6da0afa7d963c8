"""What the files of a budget hold, and writing them."""

import shlex
from collections.abc import Iterable, Iterator, Sequence

import onnx

from rdoq_onnx.analysis.network import modified
from rdoq_onnx.cost.template import template
from rdoq_onnx.report.result import Result
from rdoq_onnx.system import io
from rdoq_onnx.system.files import Files


def contents(result: Result, files: Files, typed: Sequence[str]) -> Iterator[tuple[str, onnx.ModelProto | str]]:
    """Make the content of all files of a budget, OUTPUT last; of one that missed a gate the reports alone."""
    if files.modified is not None and result.failure is None:
        yield files.modified, modified(result.curves.network)
    if files.cost_template is not None:
        measured = result.curves
        yield files.cost_template, template(measured.network, measured.observation.sizes, result.config.cost)
    if files.json is not None:
        yield files.json, result.report.to_json(files.output)
    if files.report is not None:
        from rdoq_onnx.report.html_report import html_report  # here: plotly is an extra, and slow to import

        yield files.report, html_report(result, files.output, shlex.join(["rdoq-onnx", *typed]))
    if result.failure is None:
        yield files.output, result.model


def write(made: Iterable[tuple[str, onnx.ModelProto | str]]) -> None:
    """Write files once all their contents are made."""
    for path, content in list(made):
        if isinstance(content, str):
            io.write_text(content, path)
        else:
            io.write_model(content, path)

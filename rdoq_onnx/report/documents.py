"""The files of a run, and those in which the runs at several budgets come together: one list of JSON, one page."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from rdoq_onnx.report.contents import contents, write
from rdoq_onnx.report.result import Result
from rdoq_onnx.report.wording import failed_document
from rdoq_onnx.system import io
from rdoq_onnx.system.files import Files, numbered

if TYPE_CHECKING:
    from rdoq_onnx.report.html_run import Run


@dataclass
class Documents:
    """Write the files of the run at each budget, and at the end those that hold all budgets.

    typed: the arguments of the command line. several: whether there is more than one budget.
    """

    files: Files
    typed: Sequence[str]
    several: bool
    _json: list[str] = field(default_factory=list)
    _runs: list["Run"] = field(default_factory=list)
    _failures: dict[str, str] = field(default_factory=dict)

    def failed(self, budget: str, reason: str) -> None:
        """Write the document of a budget that could not be met."""
        own = self._own(budget)
        document = failed_document(self.files.input, own.output, reason)
        self._json.append(document)
        self._failures[budget] = reason
        if own.json is not None:
            io.write_text(document, own.json)

    def add(self, budget: str, result: Result) -> None:
        """Write the files of a run; of one that missed a gate the reports alone."""
        own = self._own(budget)
        self._json.append(result.report.to_json(own.output))
        made = [*contents(result, own, self.typed)]
        if self._one_page:
            from rdoq_onnx.report.html_run import html_run  # here: plotly is an extra, and slow to import

            self._runs.append(html_run(result, own.output, budget, len(self._runs)))
        write(made)

    def finish(self) -> None:
        """Write what holds all budgets."""
        if self._one_list and self.files.json is not None:
            io.write_text(f"[{', '.join(text.rstrip() for text in self._json)}]\n", self.files.json)
        if self._one_page and self.files.report is not None and self._runs:
            from rdoq_onnx.report.html_report import html_page  # here: see `add`

            command = shlex.join(["rdoq-onnx", *self.typed])
            io.write_text(html_page(self._runs, command, self._failures), self.files.report)

    @property
    def _one_list(self) -> bool:
        return self.several and self.files.json is not None and not numbered(self.files.json)

    @property
    def _one_page(self) -> bool:
        return self.several and self.files.report is not None and not numbered(self.files.report)

    def _own(self, budget: str) -> Files:
        """Return the files of one budget alone."""
        own = self.files.at(budget)
        return replace(own, json=None if self._one_list else own.json, report=None if self._one_page else own.report)

"""The files that a run of the command line reads and writes, checked before the long work."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rdoq_onnx.errors import ConfigError
from rdoq_onnx.system import io
from rdoq_onnx.system.curve_files import CurveFiles

BITS, BUDGET = "{bits}", "{budget}"  # either stands for the budget in a file name


@dataclass(frozen=True)
class Files:
    """The files that a run reads and writes."""

    input: str
    output: str
    calibration: str | None
    validation: str | None
    modified: str | None
    json: str | None
    report: str | None
    curves: CurveFiles
    cost_template: str | None = None

    def at(self, bits: str) -> "Files":
        """Return the files of the budget `bits`, which replaces {bits} and {budget}."""

        def filled(path: str | None) -> str | None:
            return None if path is None else path.replace(BITS, bits).replace(BUDGET, bits)

        output = self.output.replace(BITS, bits).replace(BUDGET, bits)
        return replace(
            self, output=output, modified=filled(self.modified), json=filled(self.json), report=filled(self.report)
        )

    def keeping_costs(self) -> "Files":
        """Return the files of a run that measures costs: these are kept beside OUTPUT, if no other file is named."""
        if self.cost_template is not None or not self.output:
            return self
        return replace(self, cost_template=str(Path(self.output).with_name(f"{Path(self.input).stem}.cost.csv")))

    @property
    def written(self) -> list[str]:
        """List the files that the run writes."""
        curves = None if self.curves.path is None else str(self.curves.path)
        files = (self.output, self.modified, self.json, self.report, curves, self.cost_template)
        return [f for f in files if f is not None and (f or self.curves.shard is None)]


def numbered(path: str) -> bool:
    """Whether a file name holds the budget."""
    return BITS in path or BUDGET in path


def check_files(files: Files, budgets: Sequence[str], option: str = "--bits") -> None:
    """Check that the files of all budgets can be written and are no others; option: what these were given with.

    Raises ConfigError or OutputError.
    """
    if files.report is not None and importlib.util.find_spec("plotly") is None:
        raise ConfigError("--report needs plotly, which is not installed: pip install 'rdoq-onnx[report]'")
    if len(budgets) > 1 and files.curves.shard is None:
        name = BITS if option == "--bits" else BUDGET
        for role, path in (("OUTPUT", files.output), ("--modified", files.modified)):
            if path is not None and not numbered(path):
                several = f"{option} {','.join(budgets)} writes {len(budgets)} files"
                raise ConfigError(f"{role} {path}: {several}; give a name with {name} in it")
    for each in map(files.at, budgets):
        for path in each.written:
            io.check_output(path, each.input)
            for role, source in (("--calibration", each.calibration), ("--validation", each.validation)):
                if source is not None and Path(path).resolve() == Path(source).resolve():
                    raise ConfigError(f"{path}: is the {role} file; give another output path")
        if len({Path(f).resolve() for f in each.written}) < len(each.written):
            raise ConfigError(
                "OUTPUT, --modified, --json, --report, --curves and --cost-template must be different files; "
                "give each its own path"
            )

"""The command line: arguments -> Config -> pipeline -> exit code. Only this module and terminal.py print."""

import gc
import importlib.util
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from rdoq_onnx.analysis.network import modified
from rdoq_onnx.config import Config
from rdoq_onnx.config_file import Kind, read_options, table_of
from rdoq_onnx.dry_run import dry_run as dry_run_of
from rdoq_onnx.dry_run import lines
from rdoq_onnx.errors import BudgetError, ConfigError, RdoqError, VerificationError
from rdoq_onnx.options import declared, make_config
from rdoq_onnx.pipeline import Job
from rdoq_onnx.report.result import Result
from rdoq_onnx.system import io
from rdoq_onnx.system.progress import Progress
from rdoq_onnx.version import __version__

INTERRUPTED = 130
_GRACE = 0.6  # seconds for an interrupted run to clean up
PYPROJECT = "pyproject.toml"
BITS = "{bits}"  # stands for the budget in a file name


@dataclass(frozen=True)
class Files:
    """The files that a run reads and writes."""

    input: str
    output: str
    calibration: str | None
    modified: str | None
    json: str | None
    report: str | None
    curves: str | None

    def at(self, bits: str) -> "Files":
        """Return the files of the budget `bits`, which replaces {bits}."""

        def filled(path: str | None) -> str | None:
            return None if path is None else path.replace(BITS, bits)

        output = self.output.replace(BITS, bits)
        return replace(
            self, output=output, modified=filled(self.modified), json=filled(self.json), report=filled(self.report)
        )


@click.command(context_settings={"max_content_width": 100, "show_default": True})
@click.argument("input", metavar="INPUT")
@click.argument("output", metavar="OUTPUT", required=False)
@declared
@click.option(
    "--config",
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=lambda *args: _defaults(*args),
    help="Take options from a TOML file.  [default: [tool.rdoq-onnx] of ./pyproject.toml]",
)
@click.version_option(__version__, message="%(version)s")
@click.pass_obj
def command(typed: Sequence[str], /, quiet: bool, verbose: bool, dry_run: bool, **options: Any) -> None:
    """Quantize the ONNX model INPUT into OUTPUT, each weight channel and activation at its own bit width."""
    if options["output"] is None and not dry_run:
        raise click.UsageError("Missing argument 'OUTPUT'")
    if quiet and verbose:
        raise ConfigError("--quiet and --verbose exclude each other; give one")
    options["output"] = options["output"] or ""
    names = ("input", "output", "calibration", "modified", "json", "report", "curves")
    files = Files(**{name: options.pop(name) for name in names})
    bits = options.pop("bits")
    configs = {text.strip(): make_config({**options, "bits": text.strip()}) for text in bits.split(",")}
    if dry_run:
        from rdoq_onnx.report.terminal import Out  # here: rich is slow to import, and --quiet does not need it

        out = Out(highlight=False, soft_wrap=True)
        for line in lines(dry_run_of(files.input, files.calibration, next(iter(configs.values()))), verbose):
            out.print(line, markup=False)
        return
    _check_files(files, [*configs])
    if files.calibration is None:
        _say(quiet, "warning: no --calibration, so samples are synthetic and all figures only indicative")
    failures = _run_all(configs, files, typed, Progress())[1] if quiet else _run_shown(configs, files, typed, verbose)
    if failures:
        for bits, error in failures.items():
            _complain(f"--bits {bits}: {error}" if len(configs) > 1 else str(error))
        sys.exit(next(iter(failures.values())).exit_code)


def _run_shown(
    configs: Mapping[str, Config], files: Files, typed: Sequence[str], verbose: bool
) -> dict[str, RdoqError]:
    """Run all budgets, showing progress and figures on the terminal; return those that failed, with the error."""
    from rdoq_onnx.report.terminal import Out, print_frontier, print_summary, shown  # here: see `command`

    with shown() as progress:
        results, failures = _run_all(configs, files, typed, progress)
    out = Out(highlight=False, soft_wrap=True)
    for bits, result in results.items():
        print_summary(out, result, files.input, files.at(bits).output, verbose)
    if len(results) > 1:
        print_frontier(out, results)
    return failures


def _run_all(
    configs: Mapping[str, Config], files: Files, typed: Sequence[str], progress: Progress
) -> tuple[dict[str, Result], dict[str, RdoqError]]:
    """Run and write all budgets; return the results, and the errors of budgets not met or not verified."""
    results: dict[str, Result] = {}
    failures: dict[str, RdoqError] = {}
    together = len(configs) > 1 and files.json is not None and BITS not in files.json
    job = Job.of(files.input, files.calibration, next(iter(configs.values())), progress, files.curves)
    for bits, config in configs.items():
        try:
            result = job.result(config, additivity=files.report is not None)
        except (BudgetError, VerificationError) as error:
            failures[bits] = error
            continue
        _write(result, replace(files.at(bits), json=None) if together else files.at(bits), typed)
        results[bits] = result
    if together and files.json is not None and results:
        reports = [result.report.to_json(files.at(bits).output).rstrip() for bits, result in results.items()]
        io.write_text(f"[{', '.join(reports)}]\n", files.json)
    return results, failures


def _defaults(context: click.Context, _: click.Parameter, path: str | None) -> None:
    """Take options missing from the command line from a TOML file."""
    if path is None and not Path(PYPROJECT).is_file():
        return
    source = path or PYPROJECT
    excluded = ("config", "version", "help", "input", "output")
    kinds = {
        option.name.replace("_", "-"): Kind(option.is_flag, option.multiple)
        for option in context.command.params
        if isinstance(option, click.Option) and option.name is not None and option.name not in excluded
    }
    context.default_map = read_options(table_of(io.read_toml(source), whole=path is not None), source, kinds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit with its code; expected errors are one line each."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        _heed_interrupts()
        gc.freeze()  # imports live as long as the process: no need to scan them at each collection
    try:
        with warnings.catch_warnings():
            # An overflow is an error that names the tensor; numpy's warning would only repeat it.
            warnings.filterwarnings("ignore", "(overflow|invalid value) encountered", RuntimeWarning)
            command.main(typed, prog_name="rdoq-onnx", standalone_mode=False, obj=tuple(typed))
    except click.ClickException as error:
        _fail(f"{error.format_message().rstrip('.')}; see rdoq-onnx --help", 2)
    except RdoqError as error:
        _fail(str(error), error.exit_code)
    except MemoryError as error:
        _fail(f"out of memory ({str(error) or 'no details'}); give fewer --samples", 2)
    except (KeyboardInterrupt, click.Abort):
        _leave()


def _heed_interrupts() -> None:
    """Exit within a second of Ctrl-C even inside a long call of ONNX Runtime, where Python runs no handler."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        while signal.SIGINT not in os.read(reading, 16):
            pass
        time.sleep(_GRACE)
        _leave()

    threading.Thread(target=watch, daemon=True).start()


def _leave() -> None:
    # Threads of ONNX Runtime may still be busy: do not wait for them.
    sys.stderr.write("rdoq-onnx: interrupted\n")
    sys.stderr.flush()
    os._exit(INTERRUPTED)


def _fail(message: str, code: int) -> None:
    _complain(message)
    sys.exit(code)


def _complain(message: str) -> None:
    sys.stderr.write(f"rdoq-onnx: error: {' '.join(message.split())}\n")


def _say(quiet: bool, message: str) -> None:
    if not quiet:
        sys.stderr.write(f"rdoq-onnx: {message}\n")


def _check_files(files: Files, budgets: Sequence[str]) -> None:
    if files.report is not None and importlib.util.find_spec("plotly") is None:
        raise ConfigError("--report needs plotly, which is not installed: pip install 'rdoq-onnx[report]'")
    if len(budgets) > 1:
        for option, path in (("OUTPUT", files.output), ("--modified", files.modified), ("--report", files.report)):
            if path is not None and BITS not in path:
                several = f"--bits {','.join(budgets)} writes {len(budgets)} files"
                raise ConfigError(f"{option} {path}: {several}; give a name with {BITS} in it")
    for each in map(files.at, budgets):
        written = [f for f in (each.output, each.modified, each.json, each.report, each.curves) if f is not None]
        for path in written:
            io.check_output(path, each.input)
            if each.calibration is not None and Path(path).resolve() == Path(each.calibration).resolve():
                raise ConfigError(f"{path}: is the --calibration file; give another output path")
        if len({Path(f).resolve() for f in written}) < len(written):
            raise ConfigError(
                "OUTPUT, --modified, --json, --report and --curves must be different files; give each its own path"
            )


def _write(result: Result, files: Files, typed: Sequence[str]) -> None:
    if files.modified is not None:
        io.write_model(modified(result.curves.network), files.modified)
    if files.json is not None:
        io.write_text(result.report.to_json(files.output), files.json)
    if files.report is not None:
        from rdoq_onnx.report.html_report import html_report  # here: plotly is an extra, and slow to import

        io.write_text(html_report(result, files.output, shlex.join(["rdoq-onnx", *typed])), files.report)
    result.save(files.output)

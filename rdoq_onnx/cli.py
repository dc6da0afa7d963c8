"""The command line: arguments -> Config -> pipeline -> exit code. Only this module and terminal.py print."""

import gc
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import click

from rdoq_onnx.cluster.ray_cluster import computing
from rdoq_onnx.config import Config
from rdoq_onnx.config_file import Kind, read_options, table_of
from rdoq_onnx.cost.given import OPTIONS, Given, given_costs
from rdoq_onnx.errors import BudgetError, ConfigError, LostError, RdoqError, UserCodeError, VerificationError
from rdoq_onnx.estimate.dry_run import dry_run as dry_run_of
from rdoq_onnx.estimate.dry_run import lines, template_of
from rdoq_onnx.estimate.expected import expected_seconds
from rdoq_onnx.options import declared, make_config
from rdoq_onnx.pipeline import Job
from rdoq_onnx.report.documents import Documents
from rdoq_onnx.report.result import Result
from rdoq_onnx.system import io
from rdoq_onnx.system.curve_files import CurveFiles, parse_shard
from rdoq_onnx.system.files import Files, check_files
from rdoq_onnx.system.interrupts import heed_interrupts, leave
from rdoq_onnx.system.progress import Progress
from rdoq_onnx.version import __version__

PYPROJECT = "pyproject.toml"


@click.command(context_settings={"max_content_width": 100, "show_default": True, "help_option_names": ["-h", "--help"]})
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
    shard = None if (text := options.pop("shard")) is None else parse_shard(text)
    if options["output"] is None and not dry_run and options["cost_template"] is None and shard is None:
        raise click.UsageError("Missing argument 'OUTPUT'")
    if quiet and verbose:
        raise ConfigError("--quiet and --verbose exclude each other; give one")
    options["output"] = options["output"] or ""
    options["curves"] = CurveFiles.of(options["curves"], shard)
    names = ("input", "output", "calibration", "validation", "modified", "json", "report", "curves", "cost_template")
    files = Files(**{name: options.pop(name) for name in names})
    costs = given_costs({name: options.pop(name) for name in OPTIONS})
    configs = _configs(options, costs)
    timed = costs.cost is not None and costs.cost.unmeasured
    files = files.keeping_costs() if timed else files
    budget = costs.option if costs.budgets else "--bits"
    with _user_traceback(verbose):
        if dry_run:
            _print_dry_run(files, next(iter(configs.values())), verbose)
            return
        if not files.output and files.cost_template is not None:
            io.check_output(files.cost_template, files.input)
            rows = template_of(files.input, files.calibration, next(iter(configs.values())))
            io.write_text(rows, files.cost_template)
            return
        check_files(files, [*configs], budget)
        if files.calibration is None:
            _say(quiet, "warning: no --calibration, so samples are synthetic and all figures only indicative")
        run = _run_all if quiet else partial(_run_shown, verbose=verbose, budget=budget)
        failures = run(configs, files, typed)
    if timed and files.output and not failures:
        kept = files.cost_template
        _say(quiet, f"--cost measured: kept in {kept}; the same run with --cost {kept} gives the same bytes")
    if failures:
        for bits, error in failures.items():
            _complain(f"{budget} {bits}: {error}" if len(configs) > 1 else str(error))
        sys.exit(next(iter(failures.values())).exit_code)


def _configs(options: Mapping[str, Any], costs: Given) -> dict[str, Config]:
    """Make a Config for each budget, by its text."""
    if costs.budgets:
        return {text: make_config({**options, "cost": costs.cost, "budget": amount}) for text, amount in costs.budgets}
    listed = [None] if options["bits"] is None else [text.strip() for text in options["bits"].split(",")]
    shared = {**options, "cost": costs.cost, "budget": None}
    return {"8" if bits is None else bits: make_config({**shared, "bits": bits}) for bits in listed}


def _print_dry_run(files: Files, config: Config, verbose: bool) -> None:
    from rdoq_onnx.report.terminal import Out, print_all  # here: rich is slow to import, and --quiet does not need it

    parts = [*lines(dry_run_of(files.input, files.calibration, config), verbose)]
    print_all(Out(highlight=False), parts)


def _run_shown(
    configs: Mapping[str, Config], files: Files, typed: Sequence[str], verbose: bool, budget: str
) -> dict[str, RdoqError]:
    """Run all budgets, showing progress and figures on the terminal; return those that failed, with the error."""
    from rdoq_onnx.report.terminal import Out, frontier, print_all, shown, summary  # here: see `_print_dry_run`

    results: dict[str, Result] = {}
    parts: list[Any] = []

    def word(bits: str, result: Result) -> None:
        results[bits] = result
        parts.extend(summary(result, files.input, files.at(bits).output, verbose))

    with shown() as progress:
        failures = _run_all(configs, files, typed, progress, word)
    if len(results) > 1:
        parts.append(frontier(results, budget))
    print_all(Out(highlight=False), parts)
    return failures


def _run_all(
    configs: Mapping[str, Config],
    files: Files,
    typed: Sequence[str],
    progress: Progress | None = None,
    word: Callable[[str, Result], None] = lambda bits, result: None,
) -> dict[str, RdoqError]:
    """Run and write all budgets; return the errors of budgets not met or not verified.

    word: called with each result before its files are written, so that no error in its figures leaves files behind.
    """
    first, progress = next(iter(configs.values())), progress or Progress()
    with computing(first.workers, first.threads) as compute:
        job = Job.of(files.input, files.calibration, first, progress, files.curves, files.validation)
        job = replace(job.computed_by(compute), single=len(configs) == 1)
        if files.curves.shard is None:
            within = 60 * first.minutes if first.minutes and len(configs) == 1 else None
            progress.expect(lambda: expected_seconds(job.normal, job.samples, first, job.runtime), len(configs), within)
            return _emit_all(job, configs, files, typed, word)
        for config in configs.values():
            job.sum_shard(config)
    return {}


def _emit_all(
    job: Job,
    configs: Mapping[str, Config],
    files: Files,
    typed: Sequence[str],
    word: Callable[[str, Result], None],
) -> dict[str, RdoqError]:
    """Emit all budgets of a job; arguments and result as of `_run_all`."""
    failures: dict[str, RdoqError] = {}
    documents = Documents(files, typed, len(configs) > 1)
    for bits, config in configs.items():
        try:
            result = job.result(config, details=files.report is not None)
        except (BudgetError, VerificationError) as error:
            failures[bits] = error
            documents.failed(bits, str(error))
            continue
        if result.failure is None:
            word(bits, result)
        else:
            failures[bits] = result.failure
        documents.add(bits, result)
    documents.finish()
    return failures


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
        heed_interrupts()
        if isinstance(sys.stdout, TextIOWrapper):  # the files are written: no letter of the table may fail the run
            sys.stdout.reconfigure(errors="replace")
        gc.freeze()  # imports live as long as the process: no need to scan them at each collection
    try:
        with warnings.catch_warnings():
            # An overflow is an error that names the tensor; numpy's warning would only repeat it.
            warnings.filterwarnings("ignore", "(overflow|invalid value) encountered", RuntimeWarning)
            warnings.filterwarnings("ignore", "Possible (nested set|set )", FutureWarning)  # in the user's patterns
            command.main(typed, prog_name="rdoq-onnx", standalone_mode=False, obj=tuple(typed))
    except click.ClickException as error:
        _fail(f"{error.format_message().rstrip('.')}; see rdoq-onnx --help", 2)
    except LostError as error:
        _complain(str(error))
        sys.stderr.flush()
        os._exit(error.exit_code)
    except RdoqError as error:
        _fail(str(error), error.exit_code)
    except MemoryError as error:
        _fail(f"out of memory ({str(error) or 'no details'}); give fewer --samples", 2)
    except (KeyboardInterrupt, click.Abort):
        leave()


def _fail(message: str, code: int) -> None:
    _complain(message)
    sys.exit(code)


def _complain(message: str) -> None:
    sys.stderr.write(f"rdoq-onnx: error: {' '.join(message.split())}\n")


def _say(quiet: bool, message: str) -> None:
    if not quiet:
        sys.stderr.write(f"rdoq-onnx: {message}\n")


@contextmanager
def _user_traceback(verbose: bool) -> Iterator[None]:
    """If `verbose`, show where the user's own code failed, in front of the error's one line."""
    try:
        yield
    except UserCodeError as error:
        if verbose and error.__cause__ is not None:
            sys.stderr.write("".join(traceback.format_exception(error.__cause__)))
        raise

"""The command line: arguments -> Config -> pipeline; exit codes. With terminal.py, what prints."""

import importlib.util
import os
import shlex
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rdoq_onnx import io, listing, pipeline
from rdoq_onnx.advice import advise
from rdoq_onnx.config import MAX_BITS, Config, Side, parse_bytes, parse_numbers, parse_pin, parse_widths
from rdoq_onnx.config_file import Kind, read_options, table_of
from rdoq_onnx.dry_run import dry_run as dry_run_of
from rdoq_onnx.errors import BudgetError, ConfigError, RdoqError, VerificationError
from rdoq_onnx.pipeline import Job, Result
from rdoq_onnx.progress import Progress
from rdoq_onnx.report import pin_of
from rdoq_onnx.terminal import Out, shown
from rdoq_onnx.version import __version__

INTERRUPTED = 130
_GRACE = 0.6  # seconds for what was begun to clean up after itself
PYPROJECT = "pyproject.toml"
BITS = "{bits}"  # in the name of a file: the budget


@dataclass(frozen=True)
class Files:
    """What a run reads and writes."""

    input: str
    output: str
    calibration: str | None
    modified: str | None
    json: str | None
    report: str | None
    curves: str | None

    def at(self, bits: str) -> "Files":
        """With the budget `bits` in place of {bits}."""
        def filled(path: str | None) -> str | None:
            return None if path is None else path.replace(BITS, bits)

        output = self.output.replace(BITS, bits)
        return replace(
            self, output=output, modified=filled(self.modified), json=filled(self.json), report=filled(self.report)
        )


@click.command(context_settings={"max_content_width": 100, "show_default": True})
@click.argument("input", metavar="INPUT")
@click.argument("output", metavar="OUTPUT", required=False)
@click.option("--bits", default="8", metavar="B",
              help="Average bits per weight and per activation element, 1 to 8; fractions are fine. Several, such as "
              "2,3,4, with {bits} in OUTPUT, make as many files of one measurement.")
@click.option("--weight-bits", metavar="B", help="The same for weights alone, 0 to 8.  [default: --bits]")
@click.option("--activation-bits", metavar="B|none",
              help="The same for activations alone, 1 to 8; none leaves them in float.  [default: --bits]")
@click.option("--joint", is_flag=True, help="Spend --bits as one budget over weights and activations together.")
@click.option("--size", metavar="BYTES",
              help="Budget of the weights in all, in place of --weight-bits: 1.5MB, 800kB.")
@click.option("--layer-limit", metavar="BYTES", help="The most bytes that the weights of any layer may take.")
@click.option("--sqnr", type=float, metavar="DB",
              help="Find the fewest bits with which the output SQNR is DB decibels or more.")
@click.option("--top1-agreement", type=float, metavar="PERCENT",
              help="Find the fewest bits with which the top class of that share of the samples stays.")
@click.option("--widths", default="0-8", metavar="LIST",
              help="Widths that a weight channel may take, in bits, such as 0-8 or 2,4,8. Beside quantized "
              "activations 8 means 7.")
@click.option("--pin", multiple=True, metavar="PATTERN=BITS",
              help="Fix the width of the layers and activations whose name is PATTERN or matches it as a regular "
              "expression; NAME[0:16] means channels 0 to 15 of a layer; may be repeated.")
@click.option("--exclude", multiple=True, metavar="PATTERN",
              help="Leave the layers of that name or regular expression in float; may be repeated.")
@click.option("--exclude-op", multiple=True, metavar="TYPE",
              help="Leave the layers of that type, such as Gemm, in float; may be repeated.")
@click.option("--calibration", metavar="PATH",
              help="Samples: an .npz with one array per input, or an .npy; axis 0 counts them. Or a folder of images, "
              ".npy, .npz or test_data_set_*/input_*.pb files; or module:function, which gives feeds.  "
              "[default: synthetic]")
@click.option("--samples", type=int, metavar="N",
              help="Use N samples, evenly spaced, a seventh of them to verify; at least 2.  "
              "[default: all, or 64 synthetic ones]")
@click.option("--image-mean", metavar="LIST",
              help="Images become (x * scale - mean) / std; a number for each channel, or one.  [default: ImageNet's]")
@click.option("--image-std", metavar="LIST", help="See --image-mean.  [default: ImageNet's]")
@click.option("--image-scale", type=float, metavar="X", help="See --image-mean.  [default: 1/255]")
@click.option("--measure", default="taylor", metavar="taylor|probe",
              help="Curves to first order, or exact and slow.")
@click.option(
    "--effort",
    default="default",
    show_default=True,
    metavar="fast|default|best",
    help="How long to look for something better than the first allocation.",
)
@click.option("--target", default="onnxruntime", metavar="NAME",
              help="The runtime that the file is for: onnxruntime, openvino or tensorrt.")
@click.option("--storage", metavar="packed|native|int8",
              help="Weights at exactly their bits, decoded at load; as INT2, INT4 and INT8; or as INT8.  "
              "[default: packed, openvino: native, tensorrt: int8]")
@click.option("--keep-channels", is_flag=True, help="Keep channels of 0 bits instead of folding them away.")
@click.option("--seed", type=int, default=0, metavar="N", help="Seed of all that is random, 0 or more.")
@click.option("--provider", default="auto", metavar="auto|cpu|cuda",
              help="Where ONNX Runtime measures; auto takes CUDA where it is there.")
@click.option("--threads", type=int, default=0, metavar="N", help="Threads of ONNX Runtime; 0 lets it choose.")
@click.option("--curves", metavar="FILE",
              help="Keep what is measured in FILE as it goes on; what FILE has is not measured again.")
@click.option("--modified", metavar="FILE",
              help="Also write the modified network F~ (an Add behind everything perturbed) as ONNX.")
@click.option("--json", metavar="FILE", help="Also write the report as JSON.")
@click.option("--report", metavar="FILE", help="Also write a page of plots and tables, for a browser: FILE.html.")
@click.option("--min-sqnr", type=float, metavar="DB",
              help="Write nothing and exit with 4 if the output SQNR is under DB decibels.")
@click.option("--max-bytes", metavar="BYTES", help="Write nothing and exit with 4 if the file would be larger.")
@click.option("--config", metavar="FILE", is_eager=True, expose_value=False, callback=lambda *given: _defaults(*given),
              help="Take options from a TOML file.  [default: [tool.rdoq-onnx] of ./pyproject.toml]")
@click.option("--dry-run", is_flag=True,
              help="List layers, activations, what stays in float and the time that it would take; write nothing.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
@click.option("--verbose", is_flag=True, help="Also list all layers and activations with their widths.")
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
    configs = {text.strip(): make_config(bits=text.strip(), **options) for text in bits.split(",")}
    if dry_run:
        out = Out(highlight=False, soft_wrap=True)
        for line in listing.lines(dry_run_of(files.input, files.calibration, next(iter(configs.values())))):
            out.print(line, markup=False)
        return
    _check_files(files, [*configs])
    if files.calibration is None:
        _say(quiet, "warning: no --calibration: the samples are synthetic, so widths and figures mean less")
    with shown(quiet) as progress:
        results, failures = _run_all(configs, files, typed, progress)
    if not quiet:
        out = Out(highlight=False, soft_wrap=True)
        for bits, result in results.items():
            _print(out, result, files.at(bits), verbose)
        if len(results) > 1:
            _print_frontier(out, results)
    if failures:
        for bits, error in failures.items():
            _complain(f"--bits {bits}: {error}" if len(configs) > 1 else str(error))
        sys.exit(next(iter(failures.values())).exit_code)


def _run_all(
    configs: Mapping[str, Config], files: Files, typed: Sequence[str], progress: Progress
) -> tuple[dict[str, Result], dict[str, RdoqError]]:
    """What each budget gave, once it is written; and those that cannot be met or failed verification."""
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


def make_config(
    *,
    bits: str,
    weight_bits: str | None,
    activation_bits: str | None,
    widths: str,
    pin: Sequence[str],
    exclude: Sequence[str],
    exclude_op: Sequence[str],
    size: str | None,
    layer_limit: str | None,
    max_bytes: str | None,
    image_mean: str | None,
    image_std: str | None,
    **rest: Any,
) -> Config:
    """Options, as they were typed, -> Config. Raises ConfigError."""
    def side(option: str, text: str | None, least: int) -> float:
        # Where --bits speaks for activations too, it may not be less than they take.
        shared = 0 if activation_bits is not None else 1
        return _number("--bits", bits, shared) if text is None else _number(option, text, least)

    if size is not None and weight_bits is not None:
        raise ConfigError("--size and --weight-bits are both budgets of the weights; give one")
    if (rest["sqnr"], rest["top1_agreement"]) != (None, None) and None not in (weight_bits, activation_bits):
        raise ConfigError("--sqnr and --top1-agreement need a budget to lower: leave out --weight-bits")
    weights = side("--weight-bits", weight_bits, 0)
    activations = None if activation_bits == "none" else side("--activation-bits", activation_bits, 1)
    return Config(
        weight_bits=weights,
        activation_bits=activations,
        widths=parse_widths(widths),
        pins=tuple(parse_pin(p) for p in pin),
        exclude=tuple(exclude),
        exclude_ops=tuple(exclude_op),
        size=parse_bytes("--size", size),
        layer_limit=parse_bytes("--layer-limit", layer_limit),
        max_bytes=parse_bytes("--max-bytes", max_bytes),
        moved=_moved(weight_bits, activation_bits),
        image_mean=parse_numbers("--image-mean", image_mean),
        image_std=parse_numbers("--image-std", image_std),
        **rest,
    )


def _moved(weight_bits: str | None, activation_bits: str | None) -> Side:
    """The budgets that --sqnr lowers: those that are not given one by one."""
    if weight_bits is None and activation_bits is None:
        return "both"
    return "weights" if weight_bits is None else "activations"


def _defaults(context: click.Context, _: click.Parameter, path: str | None) -> None:
    """Take what the command line does not say from a TOML file."""
    if path is None and not Path(PYPROJECT).is_file():
        return
    source = path or PYPROJECT
    unfit = ("config", "version", "help", "input", "output")
    kinds = {
        option.name.replace("_", "-"): Kind(option.is_flag, option.multiple)
        for option in context.command.params
        if isinstance(option, click.Option) and option.name is not None and option.name not in unfit
    }
    context.default_map = read_options(table_of(io.read_toml(source), whole=path is not None), source, kinds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit with its code; every expected error is one line."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        _heed_interrupts()
    try:
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
    """Leave within a second of Ctrl-C also where Python has no say: in a long call of ONNX Runtime."""
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
    # Threads of ONNX Runtime may still be busy: leave without waiting for them.
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


def _number(option: str, text: str, least: int) -> float:
    """A number of bits, checked here so that the error names the option that was typed."""
    try:
        value = float(text)
    except ValueError:
        expected = "a number or none" if option == "--activation-bits" else "a number"
        raise ConfigError(f"{option} {text!r} is not {expected}; give {least} to {MAX_BITS}") from None
    if not least <= value <= MAX_BITS:
        aside = "; --weight-bits and --activation-bits set one side alone" if option == "--bits" else ""
        raise ConfigError(f"{option} {text} is out of range; give {least} to {MAX_BITS}{aside}")
    return value


def _check_files(files: Files, budgets: Sequence[str]) -> None:
    if files.report is not None and importlib.util.find_spec("plotly") is None:
        raise ConfigError("--report needs plotly, which is not installed: pip install 'rdoq-onnx[report]'")
    if len(budgets) > 1:
        for option, path in (("OUTPUT", files.output), ("--modified", files.modified), ("--report", files.report)):
            if path is not None and BITS not in path:
                makes = f"--bits {','.join(budgets)} makes {len(budgets)} of them"
                raise ConfigError(f"{option} {path}: {makes}; give a name with {BITS} in it")
    for each in map(files.at, budgets):
        written = [f for f in (each.output, each.modified, each.json, each.report, each.curves) if f is not None]
        for path in written:
            io.check_output(path, each.input)
            if each.calibration is not None and Path(path).resolve() == Path(each.calibration).resolve():
                raise ConfigError(f"{path}: is the file of --calibration; give another output path")
        if len({Path(f).resolve() for f in written}) < len(written):
            raise ConfigError("OUTPUT, --modified, --json, --report and --curves must be different files; "
                              "give each its own path")  # fmt: skip


def _write(result: Result, files: Files, typed: Sequence[str]) -> None:
    if files.modified is not None:
        io.write_model(pipeline.modified(result.curves.network), files.modified)
    if files.json is not None:
        io.write_text(result.report.to_json(files.output), files.json)
    if files.report is not None:
        from rdoq_onnx.html_report import html_report  # here: plotly is an extra, and slow to import

        io.write_text(html_report(result, files.output, shlex.join(["rdoq-onnx", *typed])), files.report)
    result.save(files.output)


def _print_frontier(out: Console, results: Mapping[str, Result]) -> None:
    """What each budget buys."""
    table = Table(title="rate and distortion", title_justify="left")
    for column in ("--bits", "bits a weight", "an activation", "file", "predicted", "measured", "SQNR"):
        table.add_column(column, justify="right")
    for bits, result in results.items():
        report = result.report
        activations = "float" if report.activation_bits is None else f"{report.activation_bits:.2f}"
        table.add_row(
            bits, f"{report.weight_bits:.2f}", activations, f"{report.output_bytes / 1000:.1f} kB",
            f"{report.predicted:.4g}", f"{report.measured:.4g}", f"{report.sqnr_db:.2f} dB",
        )  # fmt: skip
    out.print(table)


def _print(out: Console, result: Result, files: Files, verbose: bool) -> None:
    report = result.report
    paths = " -> ".join(map(click.format_filename, (files.input, files.output)))
    table = Table(title=Text(paths), show_header=False, title_justify="left")
    for figure, value in report.rows():
        table.add_row(figure, value)
    out.print(table)
    for line in advise(result.allocation, result.config, report):
        out.print(f"next: {line}", markup=False)
    for tensor, reason in report.probed.items():
        out.print(f"measured exactly, {reason}: {tensor}", markup=False)
    if report.skipped:
        out.print(f"left in float: {len(report.skipped)} nodes", markup=False)
        for skip in report.skipped:
            out.print(f"  {skip.op_type} {skip.node}: {skip.reason}", markup=False)
    for node, reason in report.float_layers.items():
        out.print(f"quantized, runs in float: {node}: {reason}", markup=False)
    for node, several in report.kept_channels.items():
        for reason, count in Counter(reason for _, reason in several).items():
            out.print(f"0 bits, kept: {count} channels of {node}: {reason}", markup=False)
    if not verbose:
        return
    for layer in report.layers:
        fed = "float" if layer.activation_bits is None else f"{layer.activation_bits} bits"
        widths = f"{len(layer.bits)} channels, {layer.mean_bits:.2f} bits on average"
        line = f"{layer.op}, {widths}, fed by {fed}"
        out.print(f"  {pin_of(layer.name, layer.mean_bits)}  # {line}", markup=False)
    for activation, bits in zip(result.curves.network.activations, result.allocation.activation_bits, strict=True):
        if activation.fusion:
            out.print(f"  # {activation.tensor}: {bits} bits for fusion", markup=False)
        else:
            out.print(f"  {pin_of(activation.tensor, bits)}  # activation", markup=False)

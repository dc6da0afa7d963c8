"""How a run is shown: bars for terminals, plain lines with the time for logs, and its figures when it is done."""

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import click
import rich.progress
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rdoq_onnx.report.advice import advise
from rdoq_onnx.report.result import Result
from rdoq_onnx.report.wording import pin_of
from rdoq_onnx.system.progress import Advance, Progress

EVERY = 20.0  # seconds between the lines of a long step


@contextmanager
def shown() -> Iterator[Progress]:
    """The progress of a run, on standard error."""
    if not sys.stderr.isatty():
        yield Lines()
    else:
        bars = Bars(Console(stderr=True))
        with bars.live:
            yield bars


class Lines(Progress):
    """A line at the end of each step, and now and then within a long one."""

    @contextmanager
    def show(self, name: str, total: int) -> Iterator[Advance]:
        begin = last = time.perf_counter()
        done = 0

        def advance(count: int) -> None:
            nonlocal done, last
            done += count
            now = time.perf_counter()
            if now - last >= EVERY and 0 < done < total:
                last = now
                left = (now - begin) * (total - done) / done
                self.note(f"{name}: {done} of {total} parts, about {left:.0f} s left")

        yield advance
        parts = f", {total} parts" if total > 1 else ""
        self.note(f"{name}: {time.perf_counter() - begin:.1f} s{parts}")

    def note(self, text: str) -> None:
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


class Bars(Progress):
    """A bar for each step with the time that it has left, and what is known so far below."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._bars = rich.progress.Progress(
            rich.progress.TextColumn("{task.description:12}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
        )
        self._notes: list[str] = []
        self.live = Live(get_renderable=self._render, console=console, refresh_per_second=8)

    @contextmanager
    def show(self, name: str, total: int) -> Iterator[Advance]:
        task = self._bars.add_task(name, total=total)
        yield lambda done: self._bars.advance(task, done)
        self._bars.update(task, completed=total)

    def note(self, text: str) -> None:
        self._notes.append(text)

    def _render(self) -> Group:
        return Group(self._bars.get_renderable(), *(Text(f"  {note}", style="dim") for note in self._notes))


class Out(Console):
    """Standard output; that its reader has gone is no error, since the model is already written."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_frontier(out: Console, results: Mapping[str, Result]) -> None:
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


def print_summary(out: Console, result: Result, source: str, output: str, verbose: bool) -> None:
    """The figures of a run; `verbose`: layers and activations as well, each as a pin to paste."""
    report = result.report
    paths = " -> ".join(map(click.format_filename, (source, output)))
    table = Table(title=Text(paths), show_header=False, title_justify="left")
    for figure, value in report.rows():
        table.add_row(figure, value)
    out.print(table)
    for line in advise(result.allocation, result.config, report):
        out.print(f"next: {line}", markup=False)
    for tensor, reason in report.probed.items():
        out.print(f"measured exactly, {reason}: {tensor}", markup=False)
    if report.weight_only:
        out.print(f"quantized in their weights alone, not searched: {len(report.weight_only)} tensors", markup=False)
        for x in report.weight_only:
            out.print(f"  {x.op} {x.name}: {x.weight}, {x.elements:,} weights, {x.bits} bits: {x.reason}", markup=False)
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

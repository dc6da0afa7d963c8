"""Show a run on the terminal: progress as bars, or as plain lines in logs, and the figures at the end."""

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import click
import rich.progress
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rdoq_onnx.analysis.skips import Skip
from rdoq_onnx.report.costs import CostReport, amount
from rdoq_onnx.report.result import Result
from rdoq_onnx.report.wording import duration, human_bytes, kept_lines, pin_of, skip_lines, step_name
from rdoq_onnx.system.outlook import Outlook
from rdoq_onnx.system.progress import Advance, Progress

EVERY = 20.0  # seconds between the progress lines of a long step
_PASTED = "--pin"  # how lines begin that are options for the next run
_COLUMN = 48  # maximum width to which options of the width list are padded


@contextmanager
def shown() -> Iterator[Progress]:
    """Show the progress of a run on standard error."""
    if not sys.stderr.isatty():
        yield Lines()
    else:
        bars = Bars(Console(stderr=True))
        with bars.live:
            yield bars


class Foreseen(Progress):
    """Progress that knows about how long the run takes, once it is told."""

    def __init__(self) -> None:
        super().__init__()
        self._begin = 0.0
        self._outlook: Outlook | None = None
        self._running = ("", 0.0, 0.0)  # the step, the share of it that is done, and when it began

    def expect(self, seconds: Callable[[], Mapping[str, float]], budgets: int = 1, within: float | None = None) -> None:
        """Estimate the time of the steps ahead; say it at once where it is long."""
        self._begin, expected = time.perf_counter(), seconds()
        self._outlook = Outlook(expected, budgets, within) if expected else None
        if self._outlook is not None and (ahead := self._outlook.left()) >= EVERY:
            self.note(f"about {duration(ahead)} expected")

    @contextmanager
    def step(self, name: str, total: int = 1) -> Iterator[Advance]:
        """Run a step, and account for its time."""
        begin = time.perf_counter()
        self._running = (name, 0.0, begin)
        with super().step(name, total) as advance:

            def advanced(count: int) -> None:
                self._running = (name, min(self._running[1] + count / max(total, 1), 1.0), begin)
                advance(count)

            yield advanced
        self._running = ("", 0.0, 0.0)
        if self._outlook is not None:
            self._outlook.ended(name, time.perf_counter() - begin)
            self.ended()

    def ended(self) -> None:
        """Show how far the run is after a step; a no-op here."""

    @property
    def whole(self) -> str:
        """Word how far the whole run is; empty as long as that is not known."""
        if self._outlook is None:
            return ""
        (name, share, begin), now = self._running, time.perf_counter()
        left, gone = self._outlook.left(name, share, now - begin if name else 0.0), now - self._begin
        return f"{100 * gone / max(gone + left, 1e-9):.0f} % of the run, about {duration(left)} left"


class Lines(Foreseen):
    """Progress as one line at the end of each step, and further lines within long ones."""

    def __init__(self) -> None:
        super().__init__()
        self._told = -math.inf  # when the time left was last told

    def ended(self) -> None:
        now = time.perf_counter()
        if now - self._told >= EVERY and self.whole:
            self._told = now
            self.note(self.whole)

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
                whole = f"; {self.whole}" if self.whole else ""
                self.note(f"{step_name(name)}: {done} of {total} parts, about {left:.0f} s left{whole}")

        yield advance
        parts = f", {total} parts" if total > 1 else ""
        self.note(f"{step_name(name)}: {time.perf_counter() - begin:.1f} s{parts}")

    def note(self, text: str) -> None:
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")


class Bars(Foreseen):
    """Progress as one bar per step with its remaining time, that of the whole run, and notes below the bars."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._bars = rich.progress.Progress(
            rich.progress.TextColumn("{task.description:24}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
        )
        self._notes: list[str] = []
        self.live = Live(get_renderable=self._render, console=console, refresh_per_second=8)

    @contextmanager
    def show(self, name: str, total: int) -> Iterator[Advance]:
        task = self._bars.add_task(step_name(name), total=total)
        yield lambda done: self._bars.advance(task, done)
        self._bars.update(task, completed=total)

    def note(self, text: str) -> None:
        self._notes.append(text)

    def _render(self) -> Group:
        notes = [Text(f"  {note}", style="dim") for note in self._notes]
        return Group(self._bars.get_renderable(), *([Text(self.whole, style="bold")] if self.whole else []), *notes)


class Out(Console):
    """Standard output; a closed pipe is not an error, since the model is already written."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def frontier(results: Mapping[str, Result], option: str = "--bits") -> Table:
    """Make a table of rate and distortion over the budgets given with `option`."""
    table = Table(title="rate and distortion", title_justify="left")
    for column in (option, "weight bits", "activation bits", "file", "predicted δ", "measured δ", "SQNR"):
        table.add_column(column, justify="right")
    for bits, result in results.items():
        report = result.report
        activations = "float" if report.activation_bits is None else f"{report.activation_bits:.2f}"
        table.add_row(
            bits,
            f"{report.weight_bits:.2f}",
            activations,
            human_bytes(report.output_bytes),
            f"{report.predicted:.4g}",
            f"{report.measured:.4g}",
            f"{report.sqnr_db:.2f} dB",
        )
    return table


def print_all(out: Console, parts: Iterable[Table | str]) -> None:
    """Print tables and lines of text; nothing in them is markup.

    A terminal gets them wrapped between words, but for options to paste; a file or a pipe gets whole lines.
    """
    for part in parts:
        pasted = isinstance(part, str) and part.lstrip().startswith(_PASTED)
        out.print(part, markup=False, soft_wrap=pasted or not out.is_terminal)


def summary(result: Result, source: str, output: str, verbose: bool) -> Iterator[Table | str]:
    """Word the figures of a run; `verbose`: also every node in float, and layers and activations as --pin."""
    report = result.report
    paths = " -> ".join(map(click.format_filename, (source, output)))
    table = Table(title=Text(paths), show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column()
    for section in report.sections():
        for figure, value in section:
            table.add_row(figure, value)
        table.add_section()
    yield table
    if report.cost is not None and (verbose or report.cost.budget is None):
        yield _cost_frontier(report.cost)
    yield from (f"hint: {line}" for line in report.advice)
    if report.by_layer:
        yield "a large network: its layers were measured one at a time, by quadratic forms"
    for tensor, reason in report.probed.items():
        yield f"measured exactly: {tensor}: {reason}"
    if report.skipped:
        yield f"left in float: {len(report.skipped)} nodes"
        yield from (f"  {line}" for line in skip_lines(report.skipped, verbose))
    operators = {layer.name: layer.op for layer in report.layers}
    kernels = [Skip(node, operators.get(node, "node"), reason) for node, reason in report.float_layers.items()]
    yield from (f"integer weights, float kernel: {line}" for line in skip_lines(kernels, verbose))
    yield from (f"0-bit channels kept: {line}" for line in kept_lines(report.kept_channels, verbose))
    if verbose:
        yield from widths(result)


def _cost_frontier(cost: CostReport) -> Table:
    table = Table(title="cost and least predicted distortion", title_justify="left")
    for column in ("of 8 bits", "cost", "predicted δ"):
        table.add_column(column, justify="right")
    for row in cost.frontier_rows():
        table.add_row(*row)
    return table


def widths(result: Result) -> Iterator[str]:
    """Word the widths of layers and activations, each as a --pin to paste."""
    lines = []
    for layer in result.report.layers:
        source = "float input" if layer.activation_bits is None else f"{layer.activation_bits}-bit input"
        widths = f"{len(layer.bits)} channels, {layer.mean_bits:.2f} bits on average"
        widths += f", blocks of {layer.block_size}" if layer.block_size else ""
        if layer.cost is not None and result.report.cost is not None:
            source += f", {amount(layer.cost, result.report.cost.unit)}"
        lines.append((pin_of(layer.name, layer.mean_bits), f"{layer.op}, {widths}, {source}"))
    for activation, bits in zip(result.curves.network.activations, result.allocation.activation_bits, strict=True):
        if activation.fusion:
            lines.append(("", f"{activation.tensor}: {bits} bits, outside the budget"))
        else:
            lines.append((pin_of(activation.tensor, bits), "activation"))
    if lines:
        yield "widths, as options for the next run:"
    column = min(_COLUMN, max((len(pin) for pin, _ in lines), default=0))
    for pin, comment in lines:
        yield f"  {pin:{column}}  # {comment}" if pin else f"  # {comment}"

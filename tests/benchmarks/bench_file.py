"""The emitted file: its size, and its speed beside the plain int8 file of ONNX Runtime's quantizer.

    python tests/benchmarks/bench_file.py [--only sizes|speed|weights|removal|openvino] [--model MODEL]
                                          [--storage packed|native|int8] [--effort fast|default|best]
                                          [--samples N] [--rounds N] [--limit N]

Models: ResNet-20 and MobileNet-v2 if ../shared/zoo exists, else models/digits_cnn.onnx. Our files come from the command
line at effort fast unless given: size and speed depend on the widths, not on how well they were chosen.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from bench_quality import EFFORTS
from files import Bench, images, peer
from judging import FailedError, program
from onnx import numpy_helper
from tables import write
from targets import EVAL, Model, models
from turns import Turns, in_turns, resident, session

from rdoq_onnx.errors import ProviderError
from rdoq_onnx.system.openvino_runtime import load

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
W4A8 = ("--weight-bits", "4", "--activation-bits", "8")


def runner(path: Path, batch: np.ndarray, threads: int = 0) -> Callable[[], object]:
    """Load `path`, warm it up, and return a function that runs it on a batch."""
    loaded = session(path, threads)
    feeds = {loaded.get_inputs()[0].name: batch}
    loaded.run(None, feeds)
    return lambda: loaded.run(None, feeds)


def verdict(value: float, bound: float) -> str:
    return "ok" if value <= bound else "MISSED"


def sizes(bench: Bench, model: Model) -> None:
    """File size beside the payload, the bits of all weights as counted by audit.py, and the bound."""
    widths = (-5, 11, 11, 11, -6)
    write(("bits", "payload kB", "file kB", "bound kB", ""), widths)
    for bits in (2, 3, 4, 6):
        path = bench.make(model, "--weight-bits", str(bits), "--activation-bits", "8")
        size, carried = path.stat().st_size, payload(path, model)
        bound = 1.9e6 if (model.name, bits) == ("mobilenet_v2", 4) else 1.08 * carried + 45e3
        write((str(bits), *(f"{v / 1000:.1f}" for v in (carried, size, bound)), verdict(size, bound)), widths)


def payload(path: Path, model: Model) -> float:
    """Return the bytes of the weights' bits, from audit.py if available, else from the run's report."""
    if EVAL.is_dir():
        audit = [EVAL / "audit.py", path, "--data", model.test, "--original", model.path, "--json"]
        return float(json.loads(program(audit))["weight_payload_bytes"])
    bits = json.loads(path.with_suffix(".json").read_text())["bits"]["weights"]
    return bits * weight_elements(model.path) / 8


def weight_elements(path: Path) -> int:
    """Count the elements of all weights that the layers of a float model read directly."""
    graph = onnx.load(path).graph
    read = {name for node in graph.node if node.op_type in LAYERS for name in node.input[:2]}
    return sum(int(np.prod(t.dims)) for t in graph.initializer if t.name in read)


def speed(bench: Bench, model: Model) -> None:
    """Inference, kernels, load and memory at 4-bit weights and 8-bit activations, beside plain int8."""
    ours, theirs = bench.make(model, *W4A8), peer(bench, model)
    widths = (-6, 8, 10, 10, 7)
    write(("batch", "threads", "ours ms", "int8 ms", "ratio"), widths)
    for size in (1, 8):
        batch = images(model.calibration, size)
        for threads in (1, 0):
            turns = in_turns(runner(ours, batch, threads), runner(theirs, batch, threads), bench.rounds)
            write((str(size), str(threads or "all"), *milliseconds(turns)), widths)
    for name, path in (("ours", ours), ("int8", theirs)):
        counts, decoded = kernels(path, bench.folder)
        kept = f" ({verdict(decoded, 0)})" if name == "ours" else ""
        sys.stdout.write(f"{name}: {counts}; weights decoded at each inference: {decoded}{kept}\n")
    load_and_memory(bench, model, ours, theirs)


def load_and_memory(bench: Bench, model: Model, ours: Path, theirs: Path) -> None:
    """Print the end of the second table: milliseconds to load, and megabytes held by a fresh process."""
    held = [resident(path) / 1e6 for path in (ours, theirs)]
    widths = (-11, 9, 9, 18, -6)
    write(("", "ours", "int8", "difference", ""), widths)
    for name, clock in (("load ms", time.perf_counter), ("load CPU ms", time.process_time)):
        turns = in_turns(lambda: session(ours), lambda: session(theirs), bench.rounds, clock)
        cells = (f"{1000 * t:.1f}" for t in (turns.first, turns.second))
        spent = 1e9 * (turns.first - turns.second) / weight_elements(model.path)
        write((name, *cells, f"{spent:+.1f} ns/element", verdict(spent, 100)), widths)
    ratio = held[0] / held[1]
    write(("MB", *(f"{h:.1f}" for h in held), f"ratio {ratio:.3f}", verdict(ratio, 1.1)), widths)


def milliseconds(turns: Turns) -> tuple[str, str, str]:
    return f"{1000 * turns.first:.3f}", f"{1000 * turns.second:.3f}", f"{turns.ratio:.3f}"


def kernels(path: Path, folder: Path) -> tuple[str, int]:
    """Return the layers' kernels in the optimized graph, and how many weights it decodes at each inference."""
    optimized = folder / "optimized.onnx"
    session(path, optimized=optimized)
    graph = onnx.load(optimized).graph
    stored = {t.name for t in graph.initializer}
    named = Counter(n.op_type for n in graph.node if any(part in n.op_type for part in ("Conv", "Gemm", "MatMul")))
    decoded = sum(n.op_type == "DequantizeLinear" and n.input[0] in stored for n in graph.node)
    return ", ".join(f"{count} {name}" for name, count in sorted(named.items())), decoded


def weights(bench: Bench, model: Model) -> None:
    """4-bit weights with float activations, beside the float model."""
    widths = (-6, 10, 10, 7, -6)
    write(("batch", "ours ms", "float ms", "ratio", ""), widths)
    path = bench.make(model, "--weight-bits", "4", "--activation-bits", "none")
    for size in (1, 8):
        batch = images(model.calibration, size)
        turns = in_turns(runner(path, batch), runner(model.path, batch), bench.rounds)
        write((str(size), *milliseconds(turns), verdict(turns.ratio, 1.02)), widths)


def removal(bench: Bench, model: Model) -> None:
    """A quarter of the channels of all hidden convolutions at 0 bits, removed and kept.

    `over` is how far the ratio of the times exceeds the remaining share of multiply-adds.
    """
    pins = [f"--pin={name}[0:{channels // 4}]=0" for name, channels in hidden(model.path).items()]
    after, before = bench.make(model, *W4A8, *pins), bench.make(model, *W4A8, *pins, "--keep-channels")
    share = multiply_adds(model, after, bench.folder) / multiply_adds(model, before, bench.folder)
    widths = (-6, 10, 10, 7, 12, 8, -6)
    write(("batch", "after ms", "before ms", "ratio", "MACs left %", "over %", ""), widths)
    for size in (1, 8):
        batch = images(model.calibration, size)
        turns = in_turns(runner(after, batch), runner(before, batch), bench.rounds)
        over = 100 * (turns.ratio / share - 1)
        write((str(size), *milliseconds(turns), f"{100 * share:.1f}", f"{over:+.1f}", verdict(over, 20)), widths)


def hidden(path: Path) -> dict[str, int]:
    """Return ungrouped convolutions except the last layer, with their number of output channels."""
    graph = onnx.load(path).graph
    sizes = {t.name: list(t.dims) for t in graph.initializer}
    layers = [n for n in graph.node if n.op_type in LAYERS]
    grouped = {n.name for n in layers for a in n.attribute if a.name == "group" and a.i > 1}
    return {n.name: sizes[n.input[1]][0] for n in layers[:-1] if n.op_type == "Conv" and n.name not in grouped}


def multiply_adds(model: Model, path: Path, folder: Path) -> int:
    """Count the multiply-adds of all layers for one sample, from the shapes of a run."""
    exposed = onnx.load(path)
    layers = [n for n in exposed.graph.node if n.op_type in LAYERS]
    values = {t.name: numpy_helper.to_array(t) for t in exposed.graph.initializer}
    wanted = {name for n in layers for name in (*n.input[:2], n.output[0])} - values.keys()
    present = {info.name for info in (*exposed.graph.output, *exposed.graph.input)}
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(wanted - present))
    onnx.save(exposed, folder / "exposed.onnx")
    loaded = session(folder / "exposed.onnx")
    feeds = {loaded.get_inputs()[0].name: images(model.calibration, 1)}
    values |= feeds | dict(zip((o.name for o in loaded.get_outputs()), loaded.run(None, feeds), strict=True))
    return sum(layer_multiply_adds(n, *(values[name].shape for name in (*n.input[:2], n.output[0]))) for n in layers)


def layer_multiply_adds(node: onnx.NodeProto, data: tuple, weight: tuple, output: tuple) -> int:
    """Count one kernel per output (Conv) or per input (ConvTranspose), or one row of the data per output."""
    if node.op_type == "ConvTranspose":
        return int(np.prod(data) * np.prod(weight[1:]))
    return int(np.prod(output) * (np.prod(weight[1:]) if node.op_type == "Conv" else data[-1]))


def openvino(bench: Bench, model: Model) -> None:
    """Agreement of OpenVINO and ONNX Runtime on the top class of test images, for a file made for OpenVINO."""
    path = bench.make(model, *W4A8, "--target", "openvino")
    loaded, other = session(path), load(onnx.load(path))
    name, same, inputs = loaded.get_inputs()[0].name, 0, images(model.test, bench.limit)
    for start in range(0, len(inputs), 50):
        feeds = {name: inputs[start : start + 50]}
        outputs = (loaded.run(None, feeds)[0], next(iter(other.run(feeds).values())))
        first, second = (logits.argmax(axis=-1) for logits in outputs)
        same += int((first == second).sum())
    share = 100 * same / len(inputs)
    kept = "ok" if share >= 99.5 else "MISSED"
    sys.stdout.write(f"{share:.2f} % of {len(inputs)} images, at least 99.5: {kept}\n")


TABLES = {table.__name__: table for table in (sizes, speed, weights, removal, openvino)}


def arguments(available: list[Model]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(TABLES), help="may be repeated")
    parser.add_argument("--model", action="append", choices=[m.name for m in available], help="may be repeated")
    parser.add_argument("--storage", choices=("packed", "native", "int8"), help="default: that of the target")
    parser.add_argument("--effort", choices=EFFORTS, default="fast")
    parser.add_argument("--samples", type=int, default=64, metavar="N", help="calibration samples of each run")
    parser.add_argument("--rounds", type=int, default=40, metavar="N", help="turns of each timing")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="test images; 0 for all")
    return parser.parse_args()


def main() -> int:
    """Print the tables; 1 if a run failed."""
    available = models()
    args = arguments(available)
    zoo = [m for m in available if m.name in ("resnet20", "mobilenet_v2")]
    picked = [m for m in available if m.name in (args.model or [m.name for m in zoo] or ["digits_cnn"])]
    storage = ("--storage", args.storage) if args.storage else ()
    options = ("--effort", args.effort, "--samples", str(args.samples), *storage)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options, args.rounds, args.limit)
        for name, model in itertools.product(args.only or TABLES, picked):
            sys.stdout.write(f"{name}, {model.name}: {str(TABLES[name].__doc__).splitlines()[0]}\n\n")
            try:
                TABLES[name](bench, model)
            except (FailedError, ProviderError) as error:
                failed += 1
                sys.stdout.write(f"failed: {error}\n")
            sys.stdout.write("\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

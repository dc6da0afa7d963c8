"""What several processes save, what each part costs them, and a model of the time on many machines.

    python tests/benchmarks/bench_workers.py [--only TABLE] [--weights 20] [--samples 24] [--tokens 64]

Tables: ratio, overhead, simulation. README.md describes each.
"""

import argparse
import heapq
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from growth import Run, run
from networks import samples_of, write
from shapes import TINYLLAMA, Decoder, decoder_of
from tables import write_markdown

from rdoq_onnx.calibration.blocks import MOST_BLOCKS, in_blocks
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.calibration.split import FITTING, HELD_OUT
from rdoq_onnx.candidates.blocks import MOST_INPUTS
from rdoq_onnx.cluster.ray_cluster import computing
from rdoq_onnx.curves.forms import MOST_WEIGHTS
from rdoq_onnx.gradients.plan import LEAST_DRAWS, MOST_DRAWS, rounds
from rdoq_onnx.system.summation import Compute, Sum

OPTIONS = ("--weight-bits", "4", "--activation-bits", "none", "--effort", "fast", "--threads", "1")
SUMS = ("tables", "moments", "sensitivity", "taylor")  # steps whose blocks are shared
LAYERS = ("rounding", "candidates")  # steps whose layers are shared
LLAMA = Decoder(layers=32, width=4096, hidden=11008, heads=32, kv_heads=32, vocabulary=32000)  # 6.7 billion weights
NETWORKS = {"1 B": TINYLLAMA, "7 B": LLAMA}
WORKERS = (1, 8, 64, 512)
NODE = 8  # processes of a node
SAMPLES, TOKENS = 128, 512  # that are modelled
MEMORY = 64e9  # bytes for the sums of one pass
REPEATS = 5


def ratio(args: argparse.Namespace) -> dict[int, Run]:
    """Print the time of a run with 0, 1 and 2 workers; return the runs."""
    shape, runs = decoder_of(args.weights * 10**6), dict[int, Run]()

    def rows() -> Iterator[tuple[str, ...]]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write(shape, folder / "model.onnx")
            samples_of(shape, folder / "calib.npz", args.samples, args.tokens)
            for workers in (0, 1, 2):
                more = ("--workers", str(workers)) if workers else ()
                runs[workers] = made = run(folder / "model.onnx", folder / "calib.npz", folder, *OPTIONS, *more)
                shared = sum(made.steps.get(name, 0) for name in (*SUMS, *LAYERS))
                cells = made.seconds, shared, made.seconds - shared, made.peak / 2**20
                yield str(workers), *(f"{value:.1f}" for value in cells)

    head = ("workers", "seconds", "of these shared steps", "others", "peak MiB of the run's process")
    write_markdown(
        f"Decoder of {shape.weights / 1e6:.0f} M weights, {args.samples} x {args.tokens} tokens:", head, rows()
    )
    return runs


@dataclass(frozen=True)
class Sized:
    """A sum of as many bytes as `size` says, which takes no time."""

    size: int
    ballast: Any

    def loaded(self) -> Any:
        return lambda block: np.zeros(self.size, np.uint8)


def overhead(compute: Compute) -> tuple[float, float]:
    """Print what a block costs beside its computation; return its seconds, and the seconds of a byte of its sum."""
    samples = Samples("benchmark", {"x": np.zeros((256, 16), np.float32)})

    def seconds(size: int, blocks: int, ballast: int = 0) -> float:
        asked = Sum.of("benchmark", Sized(size, np.zeros(ballast, np.uint8)), in_blocks(samples, 1, most=blocks))
        best = np.inf
        for _ in range(REPEATS):
            begin = time.perf_counter()
            for _ in compute(asked, range(len(asked.blocks))):
                pass
            best = min(best, time.perf_counter() - begin)
        return float(best)

    seconds(8, 2)  # which starts the processes
    empty = [seconds(8, n) for n in (8, 128)]
    each = (empty[1] - empty[0]) / 120
    byte = max(seconds(1 << 27, 8) - empty[0], 1e-6) / (8 << 27)
    shared = max(seconds(8, 8, 1 << 28) - empty[0], 1e-6)
    rows = [
        ("a block, with its sum of 8 bytes", f"{1e3 * each:.2f} ms"),
        ("a sum of 1 GB, from a process on this machine", f"{1e9 * byte:.2f} s"),
        ("what all blocks share, 1 GB, to two processes of this machine", f"{shared * 1e9 / (1 << 28):.2f} s"),
    ]
    write_markdown("Overheads of Ray, two processes:", ("what", "costs"), rows)
    return each, byte


@dataclass(frozen=True)
class Costs:
    """Seconds on one core: of sums for a weight and token, of layers for a weight and input, and of all else.

    rest: for a weight, what no process shares. block, byte: of one more block, and of a byte of its sum.
    """

    sums: Mapping[str, float]
    layers: float
    rest: float
    block: float
    byte: float

    @classmethod
    def of(cls, made: Run, shape: Decoder, args: argparse.Namespace, block: float, byte: float) -> "Costs":
        """Take the costs from a run of a network of `shape`, in seconds of the processor: others may use it, too."""
        own = made.processor / made.seconds
        shared = sum(made.steps.get(name, 0) for name in (*SUMS, *LAYERS))
        work = sum(k * o * min(k, MOST_INPUTS) for k, o in matrices(shape))
        ran = runs_of(args.samples, MOST_DRAWS)
        return cls(
            {name: own * made.steps.get(name, 0) / shape.weights / ran[name] / args.tokens for name in SUMS},
            own * sum(made.steps.get(name, 0) for name in LAYERS) / work,
            own * (sum(made.steps.values()) - shared) / shape.weights,
            block,
            byte,
        )


def runs_of(samples: int, draws: int) -> dict[str, int]:
    """Return how often a sample runs for each sum, of `samples` in all; draws: of curves, at least."""
    seen = int(samples * (1 - HELD_OUT))
    fitting = int(seen * FITTING)
    counts = {"tables": (seen, draws), "sensitivity": (fitting, LEAST_DRAWS), "taylor": (seen - fitting, draws)}
    return {"moments": fitting, **{name: n * rounds(n, least) for name, (n, least) in counts.items()}}


def matrices(shape: Decoder) -> list[tuple[int, int]]:
    """List the inputs and outputs of all matrices of a decoder but its tables."""
    kv = shape.kv_heads * shape.head_width
    each = [(shape.width, shape.width), (shape.width, kv), (shape.width, kv), (shape.width, shape.width)]
    each += [(shape.width, shape.hidden)] * 2 + [(shape.hidden, shape.width)]
    return each * shape.layers


def sizes(shape: Decoder) -> dict[str, int]:
    """Return the bytes of each of the sums of a decoder."""

    def second(inputs: int) -> int:
        return inputs * min(inputs, MOST_INPUTS)

    inputs = shape.layers * (3 * second(shape.width) + second(shape.hidden))
    weights = sum(k * o for k, o in matrices(shape))
    return {
        "tables": 16 * (second(shape.width) + shape.vocabulary),
        "moments": 8 * inputs,
        "sensitivity": 4 * sum(second(k) for k, _ in matrices(shape)),
        "taylor": 4 * (weights if weights <= MOST_WEIGHTS else sum(k + o for k, o in matrices(shape))),
    }


def scheduled(tasks: Sequence[float], workers: int, send: float) -> float:
    """Return when the last of `tasks` arrives: each worker takes the next, and sums arrive one at a time."""
    free, arrived = [0.0] * workers, 0.0
    ended = []
    for seconds in tasks:
        ended.append(heapq.heappop(free) + seconds)
        heapq.heappush(free, ended[-1])
    for end in sorted(ended):
        arrived = max(arrived, end) + send
    return arrived


def simulated(shape: Decoder, costs: Costs, workers: int, bandwidth: float) -> dict[str, float]:
    """Return the seconds of each part of a run on the samples of the model."""
    nodes = max(workers // NODE, 1)
    byte = costs.byte if nodes == 1 else max(costs.byte, 1 / bandwidth)
    parts = {"model to nodes": 4 * shape.weights / bandwidth * int(np.ceil(np.log2(nodes)))}
    ran = runs_of(SAMPLES, LEAST_DRAWS)
    for name, size in sizes(shape).items():
        passes = max(int(np.ceil(size / MEMORY)), 1)
        each = costs.sums[name] * shape.weights * ran[name] * TOKENS / passes / MOST_BLOCKS
        parts[name] = passes * scheduled([each + costs.block] * MOST_BLOCKS, workers, size / passes * byte)
    layers = sorted((costs.layers * k * o * min(k, MOST_INPUTS) for k, o in matrices(shape)), reverse=True)
    largest = max(k * o for k, o in matrices(shape))
    parts["layers"] = scheduled([s + costs.block for s in layers], workers, 12 * largest * byte)
    parts["in the run's process"] = costs.rest * shape.weights
    return parts


def simulation(costs: Costs, bandwidth: float) -> None:
    """Print the modelled time on many workers, and what takes most of it."""

    def rows() -> Iterator[tuple[str, ...]]:
        for name, shape in NETWORKS.items():
            alone = sum(simulated(shape, costs, 1, bandwidth).values())
            for workers in WORKERS:
                parts = simulated(shape, costs, workers, bandwidth)
                total = sum(parts.values())
                most = sorted(parts, key=lambda part: -parts[part])[:3]
                shares = ", ".join(f"{part} {100 * parts[part] / total:.0f} %" for part in most)
                yield name, str(workers), f"{total / 3600:.2f}", f"{alone / total:.1f}", shares

    head = ("network", "workers", "hours", "times as fast as one", "largest parts")
    write_markdown(
        f"Modelled, {SAMPLES} x {TOKENS} tokens, nodes of {NODE} workers, {bandwidth / 1e9:g} GB/s:", head, rows()
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", action="append", choices=("ratio", "overhead", "simulation"))
    arguments.add_argument("--weights", type=int, default=20, help="of the measured decoder, in millions")
    arguments.add_argument("--samples", type=int, default=24)
    arguments.add_argument("--tokens", type=int, default=64)
    arguments.add_argument("--bandwidth", type=float, default=1.25, help="between nodes, in GB/s")
    args = arguments.parse_args()
    only = set(args.only or ("ratio", "overhead", "simulation"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    runs = ratio(args) if only & {"ratio", "simulation"} else {}
    if only & {"overhead", "simulation"}:
        with computing("2", 1) as compute:
            block, byte = overhead(compute)
    if "simulation" in only:
        shape = decoder_of(args.weights * 10**6)
        simulation(Costs.of(runs[0], shape, args, block, byte), 1e9 * args.bandwidth)


if __name__ == "__main__":
    main()

"""Weights only, activations in float: other tools' files and ours with at most as many bytes, by the same judge.

    python tests/benchmarks/bench_weight_only.py --minilm FOLDER --peers PYTHON [--only minilm|stories260k]
                                                 [--tools rtn,gptq,gptq_mended,awq,awq_mended,rtn8,own]
                                                 [--effort fast|default|best] [--samples N] [--limit N] [--keep FOLDER]

MiniLM is judged by score_sts.py of ../shared/eval, stories260k by score_lm.py. FOLDER is one that
../shared/zoo/minilm/make.py made, PYTHON an interpreter that has the tools; see weight_only_peers.py. What is not there
is skipped with a reason. All tools calibrate on the same samples and start from the graph that ONNX Runtime's BASIC
level writes: Neural Compressor makes it anyway, and what it saves in the graph would count as better weights.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path

import onnxruntime as ort
from judging import FailedError, program
from tables import write_markdown
from targets import EVAL, ZOO

HEAD = ("tool", "bits", "block", "tables", "kB")
TOOLS = {
    "rtn": "ONNX Runtime, to nearest",
    "gptq": "Neural Compressor, GPTQ",
    "gptq_mended": "Neural Compressor, GPTQ, mended",
    "awq": "Neural Compressor, AWQ",
    "awq_mended": "Neural Compressor, AWQ, mended",
    "rtn8": "ONNX Runtime, to nearest",
    "own": "rdoq-onnx",
}
TRIES = 4  # runs for one size
ALIKE = 1.01  # files whose sizes differ by less share one of ours


@dataclass(frozen=True)
class Network:
    """A model with its samples, the script that judges it, and the sizes of blocks that its layers are divided into."""

    name: str
    path: Path
    calibration: Path
    judge: str
    test: Path
    blocks: tuple[int, int]


@dataclass(frozen=True)
class Bench:
    """Where files go, and how they are made and judged."""

    folder: Path
    peers: Path
    tools: tuple[str, ...]
    samples: int
    effort: str
    limit: int


@dataclass(frozen=True)
class File:
    """A quantized file, as a row of the table."""

    path: Path
    tool: str
    bits: str
    block: str
    tables: str
    seconds: float

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size


def networks(minilm: Path | None) -> Iterator[Network | str]:
    """Yield the models that are there, and a reason for each that is not."""
    stories = ZOO / "stories260k"
    if minilm is None:
        yield "minilm is skipped: --minilm gives no folder"
    elif not (EVAL.is_dir() and ZOO.is_dir() and (minilm / "model.onnx").is_file()):
        yield f"minilm is skipped: no {minilm / 'model.onnx'}, or no {EVAL} and {ZOO} to judge it"
    else:
        judged = ("score_sts.py", ZOO / "minilm" / "stsb_test.npz")
        yield Network("minilm", minilm / "model.onnx", minilm / "calib.npz", *judged, (32, 128))
    if not (EVAL.is_dir() and stories.is_dir()):
        yield f"stories260k is skipped: no {stories} or no {EVAL}"
    else:  # its layers have 64 inputs, which a block of 128 would pad
        judged = ("score_lm.py", stories / "test.npz")
        yield Network("stories260k", stories / "model.onnx", stories / "calib.npz", *judged, (32, 64))


def prepared(network: Network, bench: Bench) -> Network:
    """Return the network with its model optimized at ONNX Runtime's BASIC level."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(bench.folder / f"{network.name}.onnx")
    ort.InferenceSession(str(network.path), options, providers=["CPUExecutionProvider"])
    return replace(network, path=Path(options.optimized_model_filepath))


def settings(network: Network, tools: Iterable[str]) -> Iterator[tuple[str, int, int]]:
    """Yield tool, bits and block of the other tools; only ONNX Runtime writes 8 bits."""
    others = [tool for tool in tools if tool not in ("rtn8", "own")]
    yield from ((tool, 4, block) for block, tool in product(network.blocks, others))
    yield from (("rtn8", 8, block) for block in network.blocks if "rtn8" in tools)


def theirs(network: Network, bench: Bench, setting: tuple[str, int, int]) -> Iterator[File]:
    """Make a file by another tool, then at 4 bits one with its tables rounded by ONNX Runtime. Raises FailedError."""
    tool, bits, block = setting
    output = bench.folder / f"{network.name}_{tool}_{bits}_{block}.onnx"
    calibration = ["--calibration", network.calibration, "--samples", str(bench.samples)]
    options, begin = ["--bits", str(bits), "--block", str(block)], time.perf_counter()
    peer(bench, [network.path, output, "--tool", tool.removesuffix("8"), *options, *calibration])
    yield File(output, TOOLS[tool], f"{bits}", f"{block}", "float", time.perf_counter() - begin)
    if bits == 4:  # the only width that it writes tables in
        rounded = output.with_stem(output.stem + "_tables")
        peer(bench, [output, rounded, "--tool", "tables", *options])
        yield File(rounded, TOOLS[tool], f"{bits}", f"{block}", f"{bits}", time.perf_counter() - begin)


def peer(bench: Bench, arguments: Iterable[str | Path]) -> str:
    """Run the peers' script in their environment. Raises FailedError."""
    script = Path(__file__).with_name("weight_only_peers.py")
    command = [str(bench.peers), str(script), *map(str, arguments)]
    done = subprocess.run(command, cwd=bench.folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise FailedError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return done.stdout


def ours(network: Network, bench: Bench, targets: Iterable[int]) -> Iterator[File | FailedError]:
    """Make a file for each target: at most as many bytes, and at least 99 % of them where weights take more bits.

    The rest of a file, beside the weights at their widths, is about the same in all of them, so each run's budget is
    the target, less 0.3 % for what differs, less the rest of the run before. The first run measures the curves; its
    seconds stand for each file.
    """
    rest, seconds = None, None
    for target in targets:
        output = bench.folder / f"{network.name}_{target}.onnx"
        for _ in range(TRIES):
            budget = int(0.95 * target) if rest is None else int(0.997 * target) - rest
            begin = time.perf_counter()
            try:
                weights = run(network, bench, output, budget)
            except FailedError as error:
                yield error
                break
            seconds = time.perf_counter() - begin if seconds is None else seconds
            size = output.stat().st_size
            rest = size - weights["payload_bytes"]
            spare = weights["payload_bytes"] < 0.99 * budget
            if size <= target and (size > 0.99 * target or spare):
                yield File(output, TOOLS["own"], f"{weights['bits']:.2f}", "mixed", "mixed", seconds)
                if spare:  # all weights are at their widest, so larger targets would give the same file
                    return
                break
        else:
            yield FailedError(f"no file of {target} bytes in {TRIES} runs")


def run(network: Network, bench: Bench, output: Path, budget: int) -> dict[str, float]:
    """Run the command line; return the bytes of the weights at their widths, and their bits. Raises FailedError."""
    report, curves = output.with_suffix(".json"), bench.folder / f"{network.name}_curves.npz"
    options = ["--size", str(budget), "--activation-bits", "none", "--effort", bench.effort, "--samples", bench.samples]
    files = ["--calibration", network.calibration, "--curves", curves, "--json", report, "--quiet"]
    program(["-m", "rdoq_onnx", network.path, output, *map(str, options), *files])
    told = json.loads(report.read_text())
    return {"payload_bytes": told["weights"]["payload_bytes"], "bits": told["bits"]["weights"]}


def targets(files: Iterable[File]) -> list[int]:
    """Return the sizes of the files, in order; the smallest stands for those that exceed it by little."""
    chosen: list[int] = []
    for size in sorted(file.bytes for file in files):
        if not chosen or size > ALIKE * chosen[-1]:
            chosen.append(size)
    return chosen


def row(network: Network, bench: Bench, file: File) -> tuple[str, ...]:
    """Judge a file on the test samples. Raises FailedError."""
    arguments = [EVAL / network.judge, file.path, network.path, "--data", network.test, "--json"]
    told = json.loads(program([*arguments, *(["--limit", str(bench.limit)] if bench.limit else [])]))
    if "kl" in told:
        figures = f"{told['perplexity']['quantized']:.3f}", f"{told['kl']:.4f}"
    else:
        figures = f"{told['sqnr_db']:.1f}", f"{told['spearman']['quantized']:.4f}"
    return file.tool, file.bits, file.block, file.tables, f"{file.bytes / 1000:.0f}", *figures, f"{file.seconds:.0f}"


def rows(network: Network, bench: Bench) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the other tools, then ours; a failure is a row with its message."""
    made = []
    for setting in settings(network, bench.tools):
        try:
            for file in theirs(network, bench, setting):
                yield row(network, bench, file)
                made.append(file)
        except FailedError as error:
            yield failure(TOOLS[setting[0]], f"{setting[1]}", f"{setting[2]}", error)
    for own in ours(network, bench, targets(made)) if "own" in bench.tools else ():
        try:
            yield row(network, bench, own) if isinstance(own, File) else failure(TOOLS["own"], "", "", own)
        except FailedError as error:
            yield failure(TOOLS["own"], "", "", error)


def failure(tool: str, bits: str, block: str, error: FailedError) -> tuple[str, ...]:
    return tool, bits, block, "", f"failed: {error}", "", "", ""


def versions(bench: Bench) -> str:
    told = json.loads(peer(bench, ["--versions"]))
    return ", ".join(f"{name} {number}" for name, number in {"rdoq-onnx": version("rdoq-onnx"), **told}.items())


def chosen(text: str) -> tuple[str, ...]:
    tools = tuple(text.split(","))
    if not set(tools) <= set(TOOLS):
        raise argparse.ArgumentTypeError(f"{text!r} is not among {', '.join(TOOLS)}")
    return tools


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minilm", type=Path, metavar="FOLDER", help="made by ../shared/zoo/minilm/make.py")
    parser.add_argument("--peers", type=Path, metavar="PYTHON", help="an interpreter that has the other tools")
    parser.add_argument("--only", choices=("minilm", "stories260k"))
    parser.add_argument("--tools", type=chosen, default=tuple(TOOLS), metavar="TOOL,...", help=", ".join(TOOLS))
    parser.add_argument("--effort", choices=("fast", "default", "best"), default="default")
    parser.add_argument("--samples", type=int, default=128, metavar="N", help="for calibration")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="test samples; 0 for all")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the files stay")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.peers is None or not args.peers.is_file():
        sys.stdout.write(f"skipped: --peers gives no interpreter that has the other tools ({args.peers})\n")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.keep or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(folder, args.peers.absolute(), args.tools, args.samples, args.effort, args.limit)
        sys.stdout.write(versions(bench) + "\n")
        for network in networks(args.minilm and args.minilm.resolve()):
            if isinstance(network, str):
                sys.stdout.write(network + "\n")
            elif args.only in (None, network.name):
                fidelity = ("perplexity", "KL") if network.judge == "score_lm.py" else ("SQNR dB", "Spearman")
                write_markdown(network.name, (*HEAD, *fidelity, "seconds"), rows(prepared(network, bench), bench))


if __name__ == "__main__":
    main()

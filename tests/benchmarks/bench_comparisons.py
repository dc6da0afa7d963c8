"""Every tool by its recommended call, on the same models, samples and judge: the figures of README and docs.

    python tests/benchmarks/bench_comparisons.py --environments FOLDER [--tools LIST] [--models LIST] [--settings LIST]
    python tests/benchmarks/bench_comparisons.py --draw

FOLDER holds an environment for each tool of comparison_peers.py, under its name: `python -m venv FOLDER/nncf &&
FOLDER/nncf/bin/pip install nncf onnxruntime`. A tool without one is left out. MINILM names the folder that
`shared/zoo/minilm/make.py` wrote. Rows are written to docs/comparisons.csv one by one, in place of rows of the same
tool, model and setting; a tool that fails has a row with the reason. --draw makes the table of docs/comparisons.md and
the charts from that file.
"""

import argparse
import csv
import datetime
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from comparison_peers import LACKS, TOOLS
from targets import ROOT, ZOO

import rdoq_onnx
from rdoq_onnx.analysis.normalization import read_normalized
from rdoq_onnx.calibration.load import load_samples
from rdoq_onnx.calibration.samples import input_specs

CSV = ROOT / "docs" / "comparisons.csv"
FIGURES = ("sqnr_db", "top1", "float_top1", "bytes", "seconds")
COLUMNS = ("model", "tool", "version", "setting", *FIGURES, "date", "commit", "failure")
SETTINGS = {
    "W8A8": ("8", "8"),
    "W6A8": ("6", "8"),
    "W4A8": ("4", "8"),
    "W3A8": ("3", "8"),
    "W4A4": ("4", "4"),
    "W4": ("4", "none"),
}
OWN = "rdoq-onnx"
MAIN_SETTINGS = ("W8A8", "W4A8")
TECHNIQUES = {"aimet+seqmse": ("W4A8",), "aimet+adaround": ("W4A8",)}
CHART = ("resnet20", "mobilenet_v2")
LONGEST_FAILURE = 160


@dataclass(frozen=True)
class Network:
    """A model with its samples; samples: how many calibrate, tested: how many judge; None for all."""

    path: Path
    calibration: Path
    test: Path
    samples: int
    tested: int | None = None


def networks() -> dict[str, Network]:
    own, minilm = ROOT / "models", Path(os.environ.get("MINILM", ROOT / "build" / "minilm"))
    digits = own / "digits_calib.npz", own / "digits_test.npz"
    found = {
        "digits_cnn": Network(own / "digits_cnn.onnx", *digits, 256),
        "digits_vit": Network(own / "digits_vit.onnx", *digits, 256),
        "resnet20": Network(
            ZOO / "cifar10/resnet20.onnx", ZOO / "cifar10/calib.npz", ZOO / "cifar10/test.npz", 256, 2000
        ),
        "mobilenet_v2": Network(
            ZOO / "imagenet/mobilenet_v2.onnx", ZOO / "imagenet/calib", ZOO / "imagenet/test", 96, 400
        ),
        "ppocr_det": Network(*(ZOO / "ppocr_det" / name for name in ("model.onnx", "calib.npz", "test.npz")), 64),
        "minilm": Network(minilm / "model.onnx", minilm / "calib_first.npz", minilm / "calib_rest.npz", 128, 256),
    }
    return {name: network for name, network in found.items() if network.path.exists()}


def split_sentences(folder: Path) -> None:
    """Write the first quarter of MiniLM's sentences for calibration, and the rest for judging."""
    with np.load(folder / "calib.npz") as data:
        arrays = dict(data)
    first = np.arange(len(next(iter(arrays.values())))) % 4 == 0
    np.savez(folder / "calib_first.npz", **{name: values[first] for name, values in arrays.items()})
    np.savez(folder / "calib_rest.npz", **{name: values[~first] for name, values in arrays.items()})


def arrays_of(network: Network, path: Path) -> None:
    """Write the samples as the model takes them, for tools that know neither photos nor bytes."""
    samples = load_samples(network.calibration, input_specs(read_normalized(network.path)[1]), network.samples)
    batches = [dict(feeds) for feeds in samples.batches(1)]
    np.savez(path, **{name: np.concatenate([b[name] for b in batches]) for name in batches[0]})


def make(tool: str, python: Path, network: Network, setting: str, output: Path) -> None:
    """Quantize `network`; raises CalledProcessError."""
    if tool == OWN:
        weights, activations = SETTINGS[setting]
        budgets = ["--weight-bits", weights, "--activation-bits", activations]
        samples = ["--calibration", network.calibration, "--samples", network.samples]
        command = ["-m", "rdoq_onnx", network.path, output, *budgets, *samples, "--quiet"]
    else:
        # A copy, in a folder of its own: some tools edit the model in place, or write reports into the current folder.
        copy, arrays = output.parent / "float.onnx", output.parent / "samples.npz"
        shutil.copyfile(network.path, copy)
        arrays_of(network, arrays)
        command = [Path(__file__).parent / "comparison_peers.py", tool, copy, arrays, setting, output]
    subprocess.run([python, *map(str, command)], check=True, capture_output=True, text=True, cwd=output.parent)


def row(name: str, tool: str, python: Path, setting: str, folder: Path) -> dict[str, str] | None:
    """Return the figures of one tool, model and setting, or why there are none; None if the tool lacks the setting."""
    network, output = networks()[name], folder / f"{name}-{tool}-{setting}.onnx"
    head = {"model": name, "tool": tool, "version": release(tool, python), "setting": setting}
    head |= {"date": datetime.date.today().isoformat(), "commit": commit()}
    begin = time.perf_counter()
    try:
        make(tool, python, network, setting, output)
        if not any(
            "Quant" in node.op_type or node.op_type.startswith("QLinear") for node in onnx.load(output).graph.node
        ):
            return head | dict.fromkeys(FIGURES, "") | {"failure": "quantizes nothing, without a word"}
        seconds = time.perf_counter() - begin
        return head | judged(network, output) | {"seconds": f"{seconds:.0f}", "failure": ""}
    except subprocess.CalledProcessError as error:
        if error.returncode == LACKS and tool != OWN:
            return None
        reason = next(reversed(error.stderr.strip().splitlines()), f"exit code {error.returncode}")
    except rdoq_onnx.RdoqError as error:
        reason = str(error).removeprefix(f"{output}: ").replace(str(output), "the file")
    return head | dict.fromkeys(FIGURES, "") | {"failure": " ".join(reason.split())[:LONGEST_FAILURE]}


def judged(network: Network, output: Path) -> dict[str, str]:
    """Compare `output` with the float model on test data; raises RdoqError for a file that does not run."""
    found = rdoq_onnx.compare(network.path, output, network.test, samples=network.tested)
    before, after = (None, None) if found.agreement is None else found.agreement.accuracy or (None, None)
    size = sum(path.stat().st_size for path in output.parent.glob(f"{output.stem}.onnx*"))
    return {
        "sqnr_db": f"{found.sqnr_db:.1f}",
        "top1": percent(after),
        "float_top1": percent(before),
        "bytes": str(size),
    }


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def release(tool: str, python: Path) -> str:
    if tool == OWN:
        return rdoq_onnx.__version__
    script = Path(__file__).parent / "comparison_peers.py"
    return subprocess.run(
        [python, script, tool, "--version"], check=True, capture_output=True, text=True
    ).stdout.strip()


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def stored() -> list[dict[str, str]]:
    if not CSV.exists():
        return []
    with CSV.open(newline="") as file:
        return [{column: r.get(column) or "" for column in COLUMNS} for r in csv.DictReader(file)]


def store(new: dict[str, str]) -> None:
    key = ("model", "tool", "setting")
    kept = [r for r in stored() if any(r[k] != new[k] for k in key)]
    order = {name: k for k, name in enumerate(networks())}
    ordered = sorted([*kept, new], key=lambda r: (order.get(r["model"], 99), r["tool"] == OWN, r["tool"], r["setting"]))
    with CSV.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(ordered)


def settings_of(name: str, tool: str) -> tuple[str, ...]:
    """Return the settings that are compared: 8 and 4 bits; of the models of the chart weights alone and 3 bits, too."""
    if tool in TECHNIQUES:
        return TECHNIQUES[tool] if name in CHART else ()
    if name in CHART:
        return (*MAIN_SETTINGS, "W4", *(("W3A8",) if tool == OWN else ()))
    return MAIN_SETTINGS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, default=Path("environments"))
    parser.add_argument("--tools", default=",".join([*TOOLS, OWN]))
    parser.add_argument("--models", default=",".join(networks()))
    parser.add_argument("--settings", help="default: those of docs/comparisons.md")
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    if options.draw:
        from comparison_chart import draw

        draw(stored())
        return
    for name in options.models.split(","):
        if name == "minilm":
            split_sentences(networks()[name].path.parent)
        for tool in options.tools.split(","):
            environment = options.environments / tool.split("+")[0]
            python = Path(sys.executable) if tool == OWN else environment / "bin" / "python"
            if not python.exists():
                sys.stderr.write(f"{tool}: no environment {python}; left out\n")
                continue
            settings = options.settings.split(",") if options.settings else settings_of(name, tool)
            for setting in settings:
                with tempfile.TemporaryDirectory() as folder:
                    found = row(name, tool, python, setting, Path(folder))
                if found is not None:
                    store(found)
                    sys.stdout.write(" ".join(found[column] for column in COLUMNS) + "\n")
                    sys.stdout.flush()


if __name__ == "__main__":
    main()

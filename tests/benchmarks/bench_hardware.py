"""The paper's hardware experiment: cycles and DRAM traffic of emitted networks on a TPU and on Eyeriss, in SCALE-Sim.

    python tests/benchmarks/bench_hardware.py plan plans.json [--only NAME] [--samples N]
    python tests/benchmarks/bench_hardware.py simulate plans.json [--array TPU|Eyeriss] [--only NAME] [--scale S]

`plan` measures each network once and writes the widths of its layers: 8 bits, one width everywhere (W4A8, W6A6), and
mixed widths of the same measured distortion, without and with the on-chip limit of each array. `simulate` needs only
the extra [sim]; --scale shrinks height and width of all inputs, for a quick look.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tables import write

if TYPE_CHECKING:
    from rdoq_onnx.allocation.allocation import Allocation

UNIFORM = {"W4A8": (4.0, 8.0), "W6A6": (6.0, 6.0)}
BUFFERS = {"TPU": 1024 * (6144 + 6144 + 2048), "Eyeriss": 1024 * 3 * 36}
STEPS = 8  # bisections of the budget that gives a distortion


def plan(path: Path, only: str | None, samples: int) -> None:
    from targets import ROOT

    zoo = ROOT.parent / "shared" / "zoo"
    networks = {
        "ResNet-20": (zoo / "cifar10" / "resnet20.onnx", zoo / "cifar10" / "calib.npz"),
        "MobileNet-v2": (zoo / "imagenet" / "mobilenet_v2.onnx", zoo / "imagenet" / "calib"),
        "SqueezeNet": (zoo / "imagenet" / "squeezenet1_1.onnx", zoo / "imagenet" / "calib"),
    }
    plans = json.loads(path.read_text()) if path.exists() else {}
    for name, files in networks.items():
        if only in (None, name):
            plans[name] = {"layers": [], "settings": {}}
            for setting, layers, widths in _settings(*files, samples):
                plans[name]["layers"] = layers
                plans[name]["settings"][setting] = widths
                write((name, setting, f"{widths['distortion']:.4g}"), (-14, -26, 10))
                path.write_text(json.dumps(plans))


def _settings(model: Path, calibration: Path, samples: int) -> Iterator[tuple[str, list[Any], dict[str, Any]]]:
    """Yield each setting with the shapes of the layers, and their widths."""
    from rdoq_onnx.allocation.budget import allocate_bits, uniform_bits
    from rdoq_onnx.analysis.analyse import analyse
    from rdoq_onnx.config import Budgets, Config
    from rdoq_onnx.curves.checkpoint import Steps
    from rdoq_onnx.curves.measure import measure, regime
    from rdoq_onnx.errors import BudgetError
    from rdoq_onnx.observation.shapes import shapes_of
    from rdoq_onnx.pipeline import Job
    from rdoq_onnx.refinement.judge import Judge
    from rdoq_onnx.system.progress import Progress

    for setting, (weights, activations) in UNIFORM.items():
        config = Config(weight_bits=weights, activation_bits=activations, samples=samples, effort="fast", threads=1)
        job = Job.of(model, calibration, config, Progress())
        network = analyse(job.normal, config.selection)
        steps = Steps(job.store, job.progress, regime(config, job.normal))
        measured = measure(network, config, job.split, job.runtime, steps)
        judge = Judge.of(measured, job.split.measuring, job.runtime, steps)
        shapes = shapes_of(measured.network.model, job.split.fitting, job.runtime)
        layers = [_shape(layer, shapes) for layer in measured.network.layers]

        def told(allocation: "Allocation", judge: Judge = judge) -> dict[str, Any]:
            return {"distortion": judge.distortion(allocation), "bits": _bits(allocation)}

        uniform = uniform_bits(measured, config.budgets)
        assert uniform is not None
        if setting == "W4A8":
            full = uniform_bits(measured, Budgets())
            assert full is not None
            yield "W8A8", layers, {"distortion": judge.distortion(full), "bits": [[8.0] * 3 for _ in layers]}
        widths = told(uniform)
        yield setting, layers, widths
        limits: dict[str, int | None] = {"": None, **{f", on a {name}": size for name, size in BUFFERS.items()}}
        for suffix, limit in limits.items():
            # What stays on the chip costs no traffic, so there activations take 8 bits where they fit.
            budgets = Budgets(joint=limit is None, layer_limit=limit, layer_limit_activations=limit is not None)

            def at(bits: float, budgets: Budgets = budgets) -> "Allocation":
                activations = bits if budgets.joint else 8.0
                return allocate_bits(measured, replace(budgets, weight_bits=bits, activation_bits=activations))  # noqa: B023

            try:
                found = _fewest(at, judge.distortion, widths["distortion"])
            except BudgetError as error:
                write((f"{setting}{suffix}: {error}",), (-1,))
                continue
            yield f"ours at {setting}{suffix}", layers, told(found)


def _fewest(at: Callable[[float], Any], distortion: Callable[[Any], float], most: float) -> Any:
    """Return the allocation of fewest bits whose distortion is at most `most`, by bisection."""
    low, high, best = 1.0, 8.0, at(8.0)
    for _ in range(STEPS):
        middle = (low + high) / 2
        tried = at(middle)
        if distortion(tried) <= most:
            high, best = middle, tried
        else:
            low = middle
    return best


def _shape(layer: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Height, width, kernel, channels and filters of a group, stride, groups and pads; a matrix is a 1 × 1 kernel."""
    use, linear = layer.uses[0], layer.linear
    if linear.op_type != "Conv":
        rows = math.prod(shapes[use.data][1:-1])
        return {
            "input": [rows, 1],
            "kernel": [1, 1],
            "channels": linear.inputs,
            "filters": linear.channels,
            "stride": 1,
        }
    height, width = shapes[use.data][2:]
    pads = use.linear.pads or (0, 0, 0, 0)
    return {
        "input": [height + pads[0] + pads[2], width + pads[1] + pads[3]],
        "kernel": list(linear.shape[2:]),
        "channels": linear.shape[1],
        "filters": linear.channels // linear.group,
        "stride": (use.linear.strides or (1,))[0],
        "groups": linear.group,
    }


def _bits(allocation: "Allocation") -> list[list[float]]:
    """Mean bits of each layer's input, weights and output; 32 of what is in float."""
    from rdoq_onnx.model.graph import Graph, after_clamps

    network = allocation.measurement.network
    widths = {
        name: float(bits)
        for a, bits in zip(network.activations, allocation.activation_bits, strict=True)
        for name in (*a.names, *a.feeds)
    }
    graph = Graph(network.model)
    result = []
    for layer, bits in zip(network.layers, allocation.layer_bits, strict=False):
        use = layer.uses[0]
        output = widths.get(after_clamps(use.output, graph), 32.0)
        result.append([widths.get(use.data, 32.0), float(bits.mean()), output])
    return result


def simulate(path: Path, only: str | None, array: str | None, scale: float) -> None:
    import systolic

    sizes = (-14, -8, -26, 12, 10, 12, 10, 8)
    write(("network", "array", "setting", "cycles", "faster", "DRAM kB", "less", "fits"), sizes)
    for name, stored in json.loads(path.read_text()).items():
        for target in (systolic.TPU, systolic.EYERISS):
            if only not in (None, name) or array not in (None, target.name):
                continue
            settings = {
                setting: told["bits"]
                for setting, told in stored["settings"].items()
                if ", on a " not in setting or setting.endswith(target.name)
            }
            totals = _totals(systolic, target, stored["layers"], settings, scale)
            base = totals["W8A8"]
            for setting, (cycles, traffic, fit) in totals.items():
                figures = (f"{cycles:,.0f}", f"{base[0] / cycles:.2f}x", f"{traffic / 1e3:,.0f}")
                less = f"{base[1] / max(traffic, 1):.2f}x"
                write((name, target.name, setting, *figures, less, f"{fit} of {len(stored['layers'])}"), sizes)


def _totals(
    systolic: Any, array: Any, layers: list[dict[str, Any]], settings: dict[str, list[list[float]]], scale: float
) -> dict[str, tuple[float, float, int]]:
    """Return cycles, bytes and the number of layers that fit on the chip, of each setting; layers run one by one."""
    totals = dict.fromkeys(settings, (0.0, 0.0, 0))
    for k, layer in enumerate(layers):
        for setting, bits in settings.items():
            run, fits = _of_layer(systolic, array, layer, bits[k], scale)
            cycles, traffic, fit = totals[setting]
            totals[setting] = (cycles + run.cycles, traffic + run.traffic, fit + fits)
    return totals


def _of_layer(systolic: Any, array: Any, layer: dict[str, Any], bits: list[float], scale: float) -> tuple[Any, bool]:
    """Run a layer with these bits of inputs, weights and outputs; also return whether it fits on the chip."""
    kernel, groups = tuple(layer["kernel"]), layer.get("groups", 1)
    height, width = (max(round(n * scale), k) for n, k in zip(layer["input"], kernel, strict=True))
    shape = systolic.Shape(height, width, kernel, layer["channels"], layer["filters"], layer["stride"])
    a, w, z = *bits[:2], min(bits[2], 8)  # on the chip an output is requantized
    positions = math.prod((n - k) // layer["stride"] + 1 for n, k in zip((height, width), kernel, strict=True))
    weights = math.prod(kernel) * layer["channels"] * layer["filters"]
    held = groups * (height * width * layer["channels"] * a + weights * w + positions * layer["filters"] * z)
    fits = held <= 8 * array.capacity
    return systolic.simulate(array, shape, groups, (a, w, z), fits), fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plan", "simulate"))
    parser.add_argument("plans", type=Path)
    parser.add_argument("--only")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--array", choices=("TPU", "Eyeriss"))
    parser.add_argument("--scale", type=float, default=1.0)
    given = parser.parse_args()
    if given.what == "plan":
        plan(given.plans, given.only, given.samples)
    else:
        simulate(given.plans, given.only, given.array, given.scale)


if __name__ == "__main__":
    main()

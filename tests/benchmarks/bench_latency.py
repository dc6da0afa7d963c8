"""Latency that `--cost measured` predicts for removed channels, beside what ONNX Runtime takes.

    python tests/benchmarks/bench_latency.py FOLDER [--model mobilenet_v2] [--shares 97,94,90]

Each network is measured once (effort fast, 48 samples; FOLDER keeps the curves) and its rows once. At each share of
what 8 bits everywhere take, widths are allocated; the file runs in turns with that of 8 bits, on one thread, so that
other load slows both. Shown are predicted and measured shares of the time at 8 bits, of the first decile of the runs.
"""

import argparse
from pathlib import Path

import numpy as np
from tables import write
from targets import ROOT, ZOO

from rdoq_onnx.allocation.budget import allocate_bits, uniform_bits
from rdoq_onnx.allocation.costed import Pricing
from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.config import Budgets, Config
from rdoq_onnx.curves.checkpoint import Steps
from rdoq_onnx.curves.measure import measure, regime
from rdoq_onnx.emission.emit import emit_model
from rdoq_onnx.errors import BudgetError
from rdoq_onnx.model.cost_rows import Amount
from rdoq_onnx.pipeline import Job
from rdoq_onnx.profiling.measured import measured_cost, one_run
from rdoq_onnx.system.progress import Progress
from rdoq_onnx.system.turns import turns

MODELS = {
    "digits_cnn": (ROOT / "models" / "digits_cnn.onnx", ROOT / "models" / "digits_calib.npz"),
    "resnet20": (ZOO / "cifar10" / "resnet20.onnx", ZOO / "cifar10" / "calib.npz"),
    "mobilenet_v2": (ZOO / "imagenet" / "mobilenet_v2.onnx", ZOO / "imagenet" / "calib"),
}
SECONDS, RUNS, DECILE = 10.0, 600, 0.1
SIZES = (-14, 7, 10, 9, 11, 10, 8)


def run(name: str, shares: list[float], folder: Path) -> None:
    path, samples = MODELS[name]
    config = Config(samples=48, effort="fast", threads=1)
    job = Job.of(str(path), samples, config, Progress(), str(folder / f"{name}.curves"))
    steps = Steps(job.store, job.progress, regime(config, job.normal))
    measured = measure(analyse(job.normal, config.selection), config, job.split, job.runtime, steps)
    job.store.flush()
    cost = measured_cost(measured, config, job.samples, job.runtime)
    whole, feeds = uniform_bits(measured, config.budgets), one_run(job.samples)
    assert whole is not None
    pricing = Pricing(measured, cost)
    reference = job.runtime.session(emit_model(whole, {}, "int8", keep_channels=True).model, "all")
    for share in shares:
        try:
            allocation = allocate_bits(measured, Budgets(cost=cost, budget=Amount(share, percent=True)))
        except BudgetError as error:
            write((f"{name} {share:g} %: {error}",), (-1,))
            continue
        emission = emit_model(allocation, {}, "int8")
        session = job.runtime.session(emission.model, "all")
        taken = np.asarray(turns([lambda: reference.run(feeds), lambda s=session: s.run(feeds)], SECONDS, RUNS))
        first, second = np.quantile(taken, DECILE, axis=0).tolist()
        predicted = pricing.total(allocation) / (pricing.at_8_bits or 1.0)
        removed = sum(map(len, emission.removed.values()))
        empty = sum(int((bits == 0).sum()) for bits in allocation.layer_bits)
        figures = (f"{predicted:.3f}", f"{second / first:.3f}", f"{predicted * first / second - 1:+.1%}")
        write((name, f"{share:g} %", f"{empty}", f"{removed}", *figures), SIZES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", action="append", choices=[*MODELS], help="may be repeated")
    parser.add_argument("--shares", default="97,94,90,85,80,70")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    write(("network", "budget", "0 bits", "removed", "predicted", "measured", "off"), SIZES)
    for name in given.model or MODELS:
        run(name, [float(share) for share in given.shares.split(",")], given.folder)


if __name__ == "__main__":
    main()

"""The steps, in order: model → analysis → candidates → curves → allocation → emission → verification."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from rdoq_onnx import io
from rdoq_onnx.additivity import Alone, affordable, measure_alone
from rdoq_onnx.analysis import Network, analyse, integer_ranges
from rdoq_onnx.budget import Allocation, allocate_bits
from rdoq_onnx.calibration import load_samples, synthetic
from rdoq_onnx.config import Config
from rdoq_onnx.emission import emit_model
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.measurement import Measurement, measure_network, split
from rdoq_onnx.observation import separated
from rdoq_onnx.parallel import workers
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.fold_batchnorm import FoldBatchNorm
from rdoq_onnx.passes.fold_constants import FoldConstants
from rdoq_onnx.passes.inline_functions import InlineFunctions
from rdoq_onnx.passes.insert_adds import InsertAdds
from rdoq_onnx.passes.normalize import Normalize, default_opset, raise_opset
from rdoq_onnx.passes.widen_floats import WidenFloats
from rdoq_onnx.probe import Prober
from rdoq_onnx.progress import Progress
from rdoq_onnx.report import Report, make_report
from rdoq_onnx.runtime import Runtime
from rdoq_onnx.samples import Samples, input_specs
from rdoq_onnx.search import Goal, fewest_bits
from rdoq_onnx.second_look import Judge, Plan, Step, second_look
from rdoq_onnx.targets import CASTS_INT4, COMPLETE, TARGETS
from rdoq_onnx.ties import runs, tie
from rdoq_onnx.untrusted import check_model, check_sizes
from rdoq_onnx.verify import check_size, verify_model

OPSET = 13
NORMALIZE = (InlineFunctions(), WidenFloats(), Normalize(OPSET), FoldConstants(), FoldBatchNorm())
_FIRST_OPSET = 7  # that ONNX Runtime takes
HELD_OUT = 0.15  # share of the samples that only verification sees
TYING = (8, 32)  # samples of exact measurements, at least and at most
TYING_WORK = {"fast": 0.0, "default": 3e10, "best": 1e11}  # elements that they may compute; larger networks go without
JUDGING = 128  # samples that the second look measures on
JUDGING_MEMORY = 1 << 27  # bytes of the float network's outputs that it holds
SYNTHETIC_SAMPLES = 64

Model = onnx.ModelProto | str | Path


@dataclass(frozen=True)
class Result:
    """A quantized model, and how it came about.

    model: the emitted ONNX. report: its figures. allocation: the width of every channel and activation, and through
    `allocation.measurement` the curves. config: the settings. alone: δ of each layer and activation by itself, where
    that was asked for.
    """

    model: onnx.ModelProto
    report: Report
    allocation: Allocation
    config: Config
    alone: Alone | None = None

    @property
    def curves(self) -> Measurement:
        """What was measured: the curves, and the candidates that they describe."""
        return self.allocation.measurement

    def save(self, path: str | Path) -> None:
        """Write the model atomically. Raises OutputError."""
        io.write_model(self.model, path)

    def _repr_html_(self) -> str:
        """The report's table, for notebooks."""
        return self.report.to_html()


def run(model: Model, calibration: Any, config: Config, progress: Progress, *, additivity: bool = False) -> Result:
    """All steps. `calibration` None means synthetic samples.

    additivity: also measure each layer and activation by itself on the samples held out, for the report as a page.

    Raises RdoqError of the kind that errors.py lists.
    """
    runtime = Runtime(config.provider, config.threads)
    check_storage(config, runtime)
    with progress.step("normalize"):
        original, normal = read_normalized(model)
        reference = runnable(original)
        network, samples = network_and_samples(normal, calibration, config, runtime)
    seen, held_out = samples.split(1 - HELD_OUT, config.seed)
    progress.note(f"{len(network.layers)} layers, {len(network.activations)} activations, {len(samples)} samples")
    measurement = measured(network, config, seen, runtime, progress)
    goal = None
    if config.sqnr is None and config.top1_agreement is None:
        with progress.step("allocate"):
            allocation = allocate_bits(measurement, config)
        allocation, steps = looked_at(allocation, config, seen, runtime, progress)
    else:
        goal = Goal.of(config, reference, held_out, measurement.observation.batching.size, runtime)
        allocation, steps = fewest_bits(
            measurement, config, goal, lambda a, c: looked_at(a, c, seen, runtime, progress)
        )
    progress.note(f"{allocation.weight_average:.2f} bits a weight, distortion {allocation.predicted:.4g} predicted")
    if steps:
        progress.note(f"second look: distortion {steps[0].before:.4g} -> {steps[-1].after:.4g} measured")
    alone = measured_alone(allocation, measurement, held_out, runtime, progress) if additivity else None
    with progress.step("emit"):
        emission = emit_model(allocation, settings(config, samples), config.storage, config.keep_channels)
    check_size(emission.model, config.max_bytes)
    with progress.step("verify"):
        verification = verify_model(reference, emission, allocation, held_out, runtime, config.min_sqnr)
    if goal is not None:
        found = goal.check(emission.model)
        progress.note(f"{goal.option} {goal.least:g}: {found:.2f} {goal.unit} on {goal.samples} samples held out")
    source = str(model) if not isinstance(model, onnx.ModelProto) else ""
    report = make_report(source, original, emission, allocation, verification, samples, progress.seconds, steps)
    return Result(emission.model, report, allocation, config, alone)


def check_storage(config: Config, runtime: Runtime) -> None:
    """Raise ConfigError if the ONNX Runtime at hand does not read the types that weights shall be stored in."""
    target = TARGETS[config.target]
    needed = COMPLETE if target.int2 else CASTS_INT4
    if (config.storage or target.storages[0]) == "native" and runtime.version < needed:
        found, first = (".".join(map(str, v)) for v in (runtime.version, needed))
        raise ConfigError(
            f"--storage native: its types need ONNX Runtime {first}, found {found}; upgrade it, or use --storage int8"
        )


def measured(
    network: Network, config: Config, samples: Samples, runtime: Runtime, progress: Progress
) -> Measurement:
    """The curves of `network`, tied to exact measurements where the effort allows."""
    measurement = measure_network(network, config, samples, runtime, progress)
    work = runs(measurement) * sum(measurement.observation.sizes.values())  # of one sample
    affordable = min(int(TYING_WORK[config.effort] / work), TYING[1])
    if config.measure == "probe" or affordable < TYING[0]:
        return measurement
    tying, observation = split(samples, config)[1].some(affordable), measurement.observation
    prober = Prober(measurement.aimed, tying, observation.metric, runtime, observation.batching)
    parts = len(network.layers) + len(network.activations)
    with progress.step("ties", parts) as advance, workers(config.threads):  # which keeps BLAS to one thread, too
        return tie(measurement, prober, advance)


def looked_at(
    allocation: Allocation,
    config: Config,
    samples: Samples,
    runtime: Runtime,
    progress: Progress,
) -> tuple[Allocation, tuple[Step, ...]]:
    """The allocation after the second look, judged on the samples that rounding was not fitted to."""
    fitting, measuring = split(samples, config)
    observation = allocation.measurement.observation
    reference = allocation.measurement.aimed.model
    judging = measuring.some(min(JUDGING, max(1, JUDGING_MEMORY // (4 * observation.metric.elements))))
    judge = Judge.of(reference, judging, observation.metric, runtime, observation.batching.size)
    plan = Plan.of(config.effort, allocation, len(judging))
    with progress.step("second look", plan.trials) as advance, workers(config.threads) as pool:
        return second_look(allocation, config, plan, judge, fitting, measuring, pool, advance)


def measured_alone(
    allocation: Allocation, measurement: Measurement, held_out: Samples, runtime: Runtime, progress: Progress
) -> Alone:
    """δ of each layer and activation by itself, at the widths of `allocation`, as `measurement` describes them.

    The second look has fitted scales and biases to what the layers in front do wrong; by itself a layer has no such
    inputs.
    """
    described = replace(allocation, measurement=measurement)
    observation = measurement.observation
    samples = held_out.some(affordable(described))
    prober = Prober(measurement.aimed, samples, observation.metric, runtime, observation.batching)
    with progress.step("additivity", len(allocation.layer_bits) + len(allocation.activation_bits)) as advance:
        return measure_alone(described, prober, advance)


def read_normalized(model: Model) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The model as it was given, and after the NORMALIZE passes. Raises ModelError."""
    original = model if isinstance(model, onnx.ModelProto) else io.read_model(model)
    check_model(original)
    return original, run_passes(NORMALIZE, original)


def runnable(original: onnx.ModelProto) -> onnx.ModelProto:
    """The float model as ONNX Runtime runs it: float16 inside as float32, and an opset of 7 at least."""
    model = run_passes(NORMALIZE[:2], original)
    return raise_opset(model, OPSET) if 0 < default_opset(model) < _FIRST_OPSET else model


def network_and_samples(
    model: onnx.ModelProto, calibration: Any, config: Config, runtime: Runtime
) -> tuple[Network, Samples]:
    """What there is to quantize in a normalized model, and the samples of a run.

    Raises ModelError, ConfigError or CalibrationError.
    """
    network = analyse(model, config)
    check_sizes(model)
    return network, separated(network, samples_for(model, calibration, config), runtime)


def samples_for(model: onnx.ModelProto, calibration: Any, config: Config) -> Samples:
    """The samples of a run. Raises CalibrationError where they do not fit the model."""
    specs = input_specs(model)
    if calibration is None:
        return synthetic(specs, config.samples or SYNTHETIC_SAMPLES, config.seed, integer_ranges(model))
    return load_samples(calibration, specs, config.samples, config.pixels)


def modified(network: Network) -> onnx.ModelProto:
    """F̃ of the supplement, with an Add behind every activation and every layer's output."""
    outputs = [u.output for layer in network.layers for u in layer.uses]
    return run_passes([InsertAdds([a.tensor for a in network.activations], outputs)], network.model)


def settings(config: Config, samples: Samples) -> dict[str, Any]:
    """What a reader of the file needs to make it again."""
    # By content: the same samples from another path, or from memory, make the same file.
    source = samples.source if samples.source == "synthetic" else f"sha256:{samples.digest}"
    return asdict(replace(config, provider="auto")) | {"calibration": source, "samples": len(samples)}

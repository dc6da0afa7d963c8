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
from rdoq_onnx.curves_file import Binding, Steps, Store
from rdoq_onnx.emission import emit_model, quantized_model
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.measurement import Measurement, judging, restored, split, stored_fields
from rdoq_onnx.measuring import measure_network, regime
from rdoq_onnx.observation import separated
from rdoq_onnx.parallel import workers
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.fold_batchnorm import FoldBatchNorm
from rdoq_onnx.passes.fold_constants import FoldConstants
from rdoq_onnx.passes.hoist_weights import HoistWeights
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
from rdoq_onnx.second_look import Judge, Looked, Plan, float_outputs, second_look
from rdoq_onnx.targets import CASTS_INT4, COMPLETE, TARGETS
from rdoq_onnx.ties import runs, tie
from rdoq_onnx.untrusted import check_model, check_sizes
from rdoq_onnx.verify import FloatRuns, check_size, float_runs, verify_model

OPSET = 13
NORMALIZE = (InlineFunctions(), WidenFloats(), Normalize(OPSET), HoistWeights(), FoldConstants(), FoldBatchNorm())
_FIRST_OPSET = 7  # that ONNX Runtime takes
HELD_OUT = 0.15  # share of the samples that only verification sees
TYING = (8, 32)  # samples of exact measurements, at least and at most
TYING_WORK = {"fast": 0.0, "default": 3e10, "best": 1e11}  # elements that they may compute; larger networks go without
JUDGING = 128  # samples that the second look measures on
FLOAT_MEMORY = 1 << 27  # bytes of inputs, and of the float network's outputs, that are held for that or verification
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


@dataclass(frozen=True)
class Job:
    """What runs at several budgets share: the model, its samples, what was measured so far.

    original: the model as it was given; reference: as ONNX Runtime runs it; normal: after the NORMALIZE passes, with
    the branches that the analysis has put in, so that it does so once for all budgets.
    held_out: samples that only verification sees; seen: the others.
    """

    source: str
    original: onnx.ModelProto
    reference: onnx.ModelProto
    normal: onnx.ModelProto
    samples: Samples
    seen: Samples
    held_out: Samples
    runtime: Runtime
    store: Store
    progress: Progress

    @classmethod
    def of(
        cls, model: Model, calibration: Any, config: Config, progress: Progress, curves: str | Path | None = None
    ) -> "Job":
        """Read and normalize `model`, find its samples, and what the file `curves` says of both, if that is given.

        `calibration` None means synthetic samples. Raises RdoqError of the kind that errors.py lists.
        """
        runtime = Runtime(config.provider, config.threads)
        check_storage(config, runtime)
        with progress.step("normalize"):
            original, normal = read_normalized(model)
            reference = runnable(original)
            network, samples = network_and_samples(normal, calibration, config, runtime)
        progress.note(f"{len(network.layers)} layers, {len(network.activations)} activations, {len(samples)} samples")
        seen, held_out = samples.split(1 - HELD_OUT, config.seed)
        source = str(model) if not isinstance(model, onnx.ModelProto) else ""
        store = store_for(normal, samples, seen, config, curves)
        return cls(source, original, reference, network.model, samples, seen, held_out, runtime, store, progress)

    def result(self, config: Config, *, additivity: bool = False) -> Result:
        """The quantized model at the budget of `config`, whose other settings are the job's.

        additivity: also measure each layer and activation by itself on the samples held out, for the report as a page.
        """
        network = analyse(self.normal, config)
        if additivity and not network.layers:
            raise ConfigError("--report: no width of this model is searched, so there is nothing to draw; use --json")
        measurement = measured(network, config, self.seen, self.runtime, self.progress, self.store)
        shared = dict(self.progress.seconds)
        try:
            return self._quantized(measurement, config, additivity)
        finally:
            self.progress.seconds = shared  # the next budget has a time of its own

    def _quantized(self, measurement: Measurement, config: Config, additivity: bool) -> Result:
        progress, runtime, seen = self.progress, replace(self.runtime, shared_arena=True), self.seen
        known = Steps(self.store, progress, regime(config))
        goal = None
        if config.sqnr is None and config.top1_agreement is None:
            with progress.step("allocate"):
                allocation = allocate_bits(measurement, config)
            looked = looked_at(allocation, config, seen, runtime, known)
        else:
            batch = measurement.observation.batching.size
            goal = Goal.of(config, self.reference, self.held_out, batch, runtime)
            looked = fewest_bits(measurement, config, goal, lambda a, c: looked_at(a, c, seen, runtime, known))
        allocation, steps = looked.allocation, looked.steps
        if allocation.layer_bits:
            average = allocation.weight_average
            progress.note(f"{average:.2f} bits a weight, distortion {allocation.predicted:.4g} predicted")
        if steps:
            progress.note(f"second look: distortion {steps[0].before:.4g} -> {steps[-1].after:.4g} measured")
        alone = measured_alone(allocation, measurement, self.held_out, runtime, progress) if additivity else None
        with progress.step("emit"):
            told = settings(config, self.samples)
            emission = emit_model(allocation, told, config.storage, config.keep_channels, looked.model)
        check_size(emission.model, config.max_bytes)
        with progress.step("verify"):
            floats = self._floats(measurement, known)
            verification = verify_model(
                self.reference, emission, allocation, self.held_out, runtime, config.min_sqnr, floats
            )
        self.store.flush()
        if goal is not None:
            found = goal.check(emission.model)
            progress.note(f"{goal.option} {goal.least:g}: {found:.2f} {goal.unit} on {goal.samples} samples held out")
        report = make_report(
            self.source, self.original, emission, allocation, verification, self.samples, progress.seconds, steps
        )
        return Result(emission.model, report, allocation, config, alone)

    def _floats(self, measurement: Measurement, known: Steps) -> FloatRuns | None:
        """The float outputs that verification compares with, which no budget changes; None if they are too large."""
        if 8 * measurement.observation.metric.elements * len(self.held_out) > FLOAT_MEMORY:
            return None
        # Two models that are the same once they are normalized give outputs that differ by rounding.
        name = f"outputs of {Binding.of(self.reference, '', {}).model}, held out"
        return known.once(name, lambda: tuple(float_runs(self.reference, measurement, self.held_out, self.runtime)))


def run(
    model: Model, calibration: Any, config: Config, progress: Progress, curves: str | Path | None = None
) -> Result:
    """All steps, for one budget; arguments as for `Job.of`."""
    return Job.of(model, calibration, config, progress, curves).result(config)


def store_for(
    model: onnx.ModelProto, samples: Samples, seen: Samples, config: Config, curves: str | Path | None
) -> Store:
    """What was measured of the normalized `model` on `seen`, in the file `curves` if there is one.

    seen: `samples` but for those that the settings' seed holds out, if any.
    """
    if curves is None:
        return Store()
    data = f"{samples.digest}, {len(seen)} of {len(samples)}"
    return Store.open(curves, Binding.of(model, data, config.measuring()))


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
    network: Network, config: Config, samples: Samples, runtime: Runtime, progress: Progress, store: Store
) -> Measurement:
    """The curves of `network`, tied to exact measurements where the effort allows; those of `store` if it has them."""
    steps = Steps(store, progress, regime(config))
    known = steps.get("measurement")
    if known is not None:
        progress.note("curves: measured before")
        return restored(known, network.model, config)
    measurement = measure_network(network, config, samples, runtime, progress, store)
    if network.layers:
        measurement = tied(measurement, config, samples, runtime, steps)
    steps.finish("measurement", stored_fields(measurement))
    return measurement


def tied(measurement: Measurement, config: Config, samples: Samples, runtime: Runtime, steps: Steps) -> Measurement:
    """`measurement` with its curves tied to exact measurements where the effort allows."""
    work = runs(measurement) * sum(measurement.observation.sizes.values())  # of one sample
    affordable = min(int(TYING_WORK[config.effort] / work), TYING[1])
    if config.measure == "probe" or affordable < TYING[0]:
        return measurement
    observation = measurement.observation
    weights, activations = (
        Prober(measurement.aimed, tying.some(affordable), observation.metric, runtime, observation.batching)
        for tying in (split(samples, config)[1], judging(samples, config))
    )
    parts = len(measurement.network.layers) + len(measurement.network.activations)
    so_far = steps.unfinished("ties")
    with workers(config.threads):  # which keeps BLAS to one thread, too
        curves = steps.step("ties", parts, lambda advance: tie(
            measurement, weights, activations, advance, so_far
        ).curves)  # fmt: skip
    return replace(measurement, curves=curves)


def looked_at(
    allocation: Allocation,
    config: Config,
    samples: Samples,
    runtime: Runtime,
    known: Steps,
) -> Looked:
    """The allocation after the second look, judged on the samples that rounding was not fitted to."""
    if not allocation.layer_bits:
        return Looked(allocation, quantized_model(allocation))
    fitting, measuring = split(samples, config)
    observation = allocation.measurement.observation
    reference = allocation.measurement.aimed.model
    tried = measuring.some(min(JUDGING, max(1, FLOAT_MEMORY // (4 * observation.metric.elements))))
    tried = tried.loaded(FLOAT_MEMORY)
    size, metric = observation.batching.size, observation.metric
    targets = known.once("outputs, judging", lambda: float_outputs(reference, tried, metric, runtime, size))
    judge = Judge(tried, size, targets, metric, runtime)
    plan = Plan.of(config.effort, allocation, len(tried))
    with known.progress.step("second look", plan.trials) as advance, workers(config.threads) as pool:
        return second_look(allocation, config, plan, judge, fitting, measuring, pool, advance, known)


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

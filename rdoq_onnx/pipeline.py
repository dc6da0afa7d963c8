"""The steps, in order: model → analysis → candidates → curves → allocation → emission → verification."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from rdoq_onnx.allocation.budget import allocate_bits
from rdoq_onnx.analysis.analyse import analyse, integer_ranges
from rdoq_onnx.analysis.network import Network
from rdoq_onnx.analysis.normalization import Model, read_normalized, runnable
from rdoq_onnx.calibration.load import load_samples, synthetic
from rdoq_onnx.calibration.samples import Samples, input_specs
from rdoq_onnx.calibration.split import HELD_OUT
from rdoq_onnx.config import Config
from rdoq_onnx.curves.checkpoint import Binding, Steps, Store
from rdoq_onnx.curves.measure import measured, regime, store_for
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.emission.emit import emit_model, settings
from rdoq_onnx.errors import ConfigError
from rdoq_onnx.model.validate import check_sizes
from rdoq_onnx.observation.batching import separated
from rdoq_onnx.passes import run_passes
from rdoq_onnx.passes.insert_adds import InsertAdds
from rdoq_onnx.refinement.judge import FLOAT_MEMORY
from rdoq_onnx.refinement.refine import looked_at
from rdoq_onnx.refinement.search import Goal, fewest_bits
from rdoq_onnx.report.report import make_report
from rdoq_onnx.report.result import Result
from rdoq_onnx.system.progress import Progress
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.targets import CASTS_INT4, COMPLETE, TARGETS
from rdoq_onnx.verification.additivity import measured_alone
from rdoq_onnx.verification.runs import FloatRuns, float_runs
from rdoq_onnx.verification.verify import check_size, verify_model

SYNTHETIC_SAMPLES = 64


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
        network = analyse(self.normal, config.selection)
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
                allocation = allocate_bits(measurement, config.budgets)
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


def check_storage(config: Config, runtime: Runtime) -> None:
    """Raise ConfigError if the ONNX Runtime at hand does not read the types that weights shall be stored in."""
    target = TARGETS[config.target]
    needed = COMPLETE if target.int2 else CASTS_INT4
    if (config.storage or target.storages[0]) == "native" and runtime.version < needed:
        found, first = (".".join(map(str, v)) for v in (runtime.version, needed))
        raise ConfigError(
            f"--storage native: its types need ONNX Runtime {first}, found {found}; upgrade it, or use --storage int8"
        )


def network_and_samples(
    model: onnx.ModelProto, calibration: Any, config: Config, runtime: Runtime
) -> tuple[Network, Samples]:
    """What there is to quantize in a normalized model, and the samples of a run.

    Raises ModelError, ConfigError or CalibrationError.
    """
    network = analyse(model, config.selection)
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



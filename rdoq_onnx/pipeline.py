"""Run the steps in order: model → analysis → candidates → curves → allocation → emission → verification."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.allocation.budget import allocate_bits
from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.normalization import Model, read_normalized, runnable
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.calibration.split import SampleSplit
from rdoq_onnx.calibration.supplied import described
from rdoq_onnx.cluster.ray_cluster import computing
from rdoq_onnx.config import Config
from rdoq_onnx.cost.early import priced
from rdoq_onnx.curves.checkpoint import Steps, Store
from rdoq_onnx.curves.large import Around
from rdoq_onnx.curves.measure import measure, regime
from rdoq_onnx.curves.measurement import Measurement
from rdoq_onnx.curves.shards import sum_own
from rdoq_onnx.curves.stores import Curves, scratch_for, store_for
from rdoq_onnx.emission.emit import Emission, emit_model, recorded_settings
from rdoq_onnx.emission.storage import check_storage
from rdoq_onnx.estimate.forecast import warned
from rdoq_onnx.gradients.plan import differentiated
from rdoq_onnx.model.cost_rows import TIMES, Cost
from rdoq_onnx.model.external import is_detached, taking
from rdoq_onnx.observation.inputs import network_and_samples, validation_samples
from rdoq_onnx.profiling.measured import measured_cost, one_run, run_seconds
from rdoq_onnx.refinement.reference import Reference
from rdoq_onnx.refinement.refine import Refined, refine
from rdoq_onnx.refinement.search import Goal, fewest_bits
from rdoq_onnx.report.advice import advised
from rdoq_onnx.report.costs import cost_report
from rdoq_onnx.report.outcome import Outcome, make_report
from rdoq_onnx.report.result import Result
from rdoq_onnx.system.progress import Progress
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.summation import Compute
from rdoq_onnx.verification.details import measured_details
from rdoq_onnx.verification.gates import missed_gate
from rdoq_onnx.verification.latency import measure_latency
from rdoq_onnx.verification.layer_outputs import compare_layers
from rdoq_onnx.verification.likeness import likeness
from rdoq_onnx.verification.predicted_parts import predicted_parts
from rdoq_onnx.verification.running import measure_running
from rdoq_onnx.verification.verify import verify


@dataclass(frozen=True)
class Job:
    """What the runs at several budgets share: the model, its samples, the measurement so far.

    original: the unmodified model; reference: in the form that ONNX Runtime runs; normal: after the NORMALIZE passes,
    with the branches of the analysis. single: whether there is one budget. times: found by --cost measured, by regime.
    """

    source: str
    original: onnx.ModelProto
    reference: onnx.ModelProto
    normal: onnx.ModelProto
    samples: Samples
    split: SampleSplit
    runtime: Runtime
    store: Store
    progress: Progress
    single: bool = True
    times: dict[str, Cost] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: Model,
        calibration: Any,
        config: Config,
        progress: Progress,
        curves: Curves = None,
        validation: Any = None,
    ) -> "Job":
        """Read and normalize `model`, load its samples, and open the checkpoint `curves` if given.

        validation: samples that goals and gates are decided on, instead of some of the calibration. None as
        `calibration` means synthetic samples. Raises the RdoqErrors of errors.py.
        """
        runtime = Runtime(config.provider, config.threads)
        check_storage(config.target, config.storage, runtime)
        with progress.step("normalize"):
            scratch = scratch_for(config, curves)
            original, normal = read_normalized(model, scratch.shelf, config.selection.activations)
            reference = runnable(original, scratch.shelf)
            network, samples = network_and_samples(normal, calibration, config, runtime, progress)
        progress.note(f"{len(network.layers)} layers, {len(network.activations)} activations, {len(samples)} samples")
        if samples.supplied:
            progress.note(f"inputs that the samples lack: {described(samples.supplied)}")
        for text in warned(network, samples, config, runtime, scratch) if is_detached(normal) else ():
            progress.note(f"warning: {text}")
        if (shapes := len(samples.by_shape())) > 1:
            seen = differentiated(samples)
            backwards = f"; gradients use the {len(seen.by_shape())} most common" if len(seen) < len(samples) else ""
            progress.note(f"samples of {shapes} shapes{backwards}; sizes and budgets are those of an average sample")
        split = SampleSplit.of(samples, config.seed)
        if validation is not None:
            other = validation_samples(network, normal, validation, config, runtime)
            split = split.validated(other, config.seed, config.seeks)
        source = str(model) if not isinstance(model, onnx.ModelProto) else ""
        store = store_for(normal, samples, len(split.seen), config, curves, scratch)
        return cls(source, original, reference, network.model, samples, split, runtime, store, progress)

    def computed_by(self, compute: Compute) -> "Job":
        """Return the job, whose sums over samples `compute` computes."""
        self.store.compute = compute
        return self

    def result(self, config: Config, *, details: bool = False) -> Result:
        """Quantize at the budget of `config`, whose other settings are the job's.

        details: also measure what the HTML report shows beside the figures of the run.
        """
        network = analyse(self.normal, config.selection)
        config = priced(network, config, self.samples, self.runtime)
        steps = Steps(self.store, self.progress, regime(config, self.normal))
        measurement = measure(network, config, self.split, self.runtime, steps, self._around(config))
        if config.cost is not None and config.cost.unmeasured:
            config = replace(config, cost=self._measured_cost(measurement, config))
        with self.progress.budget():
            large = is_detached(self.normal)  # a shared arena keeps what the largest session took
            job = replace(self, runtime=replace(self.runtime, shared_arena=not large))
            with taking(self.store.scratch.shelf if large else None):
                return job._at(measurement, config, steps, details)

    def sum_shard(self, config: Config) -> None:
        """Compute the share of this run's shard in the sums of the measurement at `config`, and keep it."""
        network = analyse(self.normal, config.selection)
        config = priced(network, config, self.samples, self.runtime)
        steps = Steps(self.store, self.progress, regime(config, self.normal))
        self.progress.note(sum_own(network, config, self.split, self.runtime, steps))

    def _measured_cost(self, measurement: Measurement, config: Config) -> Cost:
        """Measure what layers take here, once for all budgets that share a measurement."""
        key = regime(config, self.normal)
        if key not in self.times:
            with self.progress.step("cost"):
                self.times[key] = measured_cost(measurement, config, self.samples, self.runtime)
        return self.times[key]

    def _around(self, config: Config) -> Around | None:
        """Return what tells which widths of a large network matter; None if all do, for other budgets."""
        unmeasured = config.cost is not None and config.cost.unmeasured
        if self.store.kept or not self.single or config.seeks or unmeasured:
            return None

        def around(measurement: Measurement) -> tuple[tuple[int, ...], NDArray[np.int64]]:
            allocation = allocate_bits(measurement, config.budgets)
            return tuple(x.block for x in allocation.measurement.layers), allocation.bits

        return around

    def _at(self, measurement: Measurement, config: Config, steps: Steps, details: bool) -> Result:
        progress, split = self.progress, self.split
        reference = Reference(self.reference, measurement, split.held_out, self.runtime).kept(steps)
        goal = Goal.of(config, replace(reference, samples=split.search, floats=None), reference)
        refined = self._refined(measurement, config, steps, goal)
        allocation = refined.allocation
        with progress.step("emit"):
            recorded = recorded_settings(config, self.samples)
            emission = emit_model(allocation, recorded, config.storage, config.keep_channels, refined.model)
        refined = replace(refined, model=onnx.ModelProto())  # no longer needed, and large
        outcome = self._judged(emission, refined, reference, config, steps)
        shown = measured_details(allocation, reference, measurement, progress) if details else None
        self.store.flush()
        if goal is not None:
            progress.note(f"{goal.option} {goal.least:g}: {goal.word(goal.prove(emission.model))}")
        report = advised(make_report(outcome), allocation, config)
        return Result(emission.model, report, allocation, config, shown, outcome.failure)

    def _judged(
        self, emission: Emission, refined: Refined, reference: Reference, config: Config, steps: Steps
    ) -> Outcome:
        """Verify what was emitted, layer by layer as well, and time it."""
        allocation, split, runtime, progress = refined.allocation, self.split, self.runtime, self.progress
        with progress.step("verify"):
            verification = verify(emission, allocation, reference)
            predicted = predicted_parts(allocation, split.measuring, runtime)
            failure = missed_gate(emission, verification, config.min_sqnr, config.max_bytes)
            alike = steps.once(f"likeness of {split.held_out.digest}", lambda: likeness(reference, split.seen))
        with progress.step("layer outputs"):
            outputs = compare_layers(emission, allocation.measurement, reference.samples, runtime)
        with progress.step("latency"):
            batch = reference.measurement.observation.batching.size
            latency = measure_latency(self.reference, emission.model, self.samples, batch, runtime)
            in_memory = emission.storage == "nbits"
            running = measure_running(self.reference, emission.model, self.samples, runtime) if in_memory else None
            timed = config.cost is not None and config.cost.unit in TIMES
            seconds = run_seconds(emission.model, one_run(self.samples), runtime) if timed else None
        return Outcome(
            self.source,
            self.original,
            self.samples,
            emission,
            allocation,
            verification,
            outputs,
            predicted,
            refined.steps,
            progress.seconds,
            failure,
            latency,
            refined.diverted,
            alike,
            running,
            cost_report(allocation, config.budgets, seconds),
        )

    def _refined(self, measurement: Measurement, config: Config, steps: Steps, goal: Goal | None) -> Refined:
        """Allocate within the budgets of `config`, or the fewest bits that reach `goal`, and refine."""
        split, runtime, progress = self.split, self.runtime, self.progress
        if goal is None:
            with progress.step("allocate"):
                allocation = allocate_bits(measurement, config.budgets)
            refined = refine(allocation, config, split, runtime, steps)
        else:
            refined = fewest_bits(measurement, config, goal, lambda a, c: refine(a, c, split, runtime, steps))
        allocation = refined.allocation
        if allocation.layer_bits:
            bits, predicted = allocation.weight_average, allocation.predicted
            progress.note(f"{bits:.2f} bits per weight, predicted distortion {predicted:.4g}")
        if refined.steps:
            before, after = refined.steps[0].before, refined.steps[-1].after
            progress.note(f"refinement: measured distortion {before:.4g} -> {after:.4g}")
        return refined


def run(
    model: Model,
    calibration: Any,
    config: Config,
    progress: Progress,
    curves: Curves = None,
    validation: Any = None,
) -> Result:
    """Run all steps for one budget; arguments as for `Job.of`. Raises the error of a missed gate."""
    with computing(config.workers, config.threads) as compute:
        job = Job.of(model, calibration, config, progress, curves, validation)
        result = job.computed_by(compute).result(config)
    if result.failure is not None:
        raise result.failure
    return result

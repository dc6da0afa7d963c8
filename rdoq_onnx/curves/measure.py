"""From samples to curves: candidates at every width, and the distortion of the output by each."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.analysis.analyse import analyse
from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.split import SampleSplit
from rdoq_onnx.candidates.candidates import Candidates
from rdoq_onnx.candidates.spooled import SpooledCodes
from rdoq_onnx.config import Config
from rdoq_onnx.curves.anchoring import anchored
from rdoq_onnx.curves.checkpoint import Steps
from rdoq_onnx.curves.divergence import chosen_metric, few_bits, has_rows, with_divergence
from rdoq_onnx.curves.float_fallback import choose_fallback, in_float, unfed
from rdoq_onnx.curves.large import Around, LargeBench, at_full_width, is_large
from rdoq_onnx.curves.measurement import (
    BlockOption,
    FloatFallback,
    MeasuredLayer,
    Measurement,
    aimed_at,
    option_curves,
    with_option_curves,
)
from rdoq_onnx.curves.product_fallback import unpaid
from rdoq_onnx.curves.scaling import scaled
from rdoq_onnx.curves.select import Layers, Measured, best_roundings, select
from rdoq_onnx.curves.shrinkage import falling_curves, squared_errors
from rdoq_onnx.curves.steps import Bench
from rdoq_onnx.curves.stored_forms import StoredWeights
from rdoq_onnx.curves.unreached import with_unreached
from rdoq_onnx.kernels.choice import slow_kernels, slow_on_integers
from rdoq_onnx.model.codes import WeightCodes
from rdoq_onnx.model.external import taking
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.observation.equalization import equalize, exponent_for, typical_widths
from rdoq_onnx.observation.observe import observe
from rdoq_onnx.observation.parts import find_parts, measured_tensors
from rdoq_onnx.probing.distortions import Distortions
from rdoq_onnx.probing.probe import Prober
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.scratch import Scratch
from rdoq_onnx.system.summation import every
from rdoq_onnx.system.threads import workers

Float = NDArray[np.float64]
T = TypeVar("T", MeasuredLayer, BlockOption)

EQUALIZING = 32  # samples that channel ranges are measured on


def regime(config: Config, model: onnx.ModelProto) -> str:
    """Name what a measurement of `model` depends on in the budgets."""
    metric = ", divergence" if few_bits(config) and has_rows(model) else ""
    if config.activation_bits is None:
        return f"weights{metric}"
    _, weights = typical_widths(config)
    return f"activations {exponent_for(config):g}, weights {weights}{metric}"


def measure_network(
    network: Network,
    config: Config,
    split: SampleSplit,
    runtime: Runtime,
    steps: Steps,
    around: Around | None = None,
) -> Measurement:
    """Observe the float network, make all candidates and measure all curves, reusing results kept by `steps`.

    Rounding is fitted on one part of the samples and measured on another: curves on its own samples would be too
    optimistic. around: of a large network, allocates on coarse curves; only widths near these are made in full.
    """
    with workers(config.threads, steps.sums()) as pool:
        source, plain, some = network.model, network, split.fitting.some(EQUALIZING)
        with taking(steps.store.scratch.shelf):
            equalized = steps.step("equalize", 1, lambda _: equalize(plain, config, some, runtime).model)
        network = analyse(steps.store.scratch.located(equalized, source), config.selection)
        slow = FloatFallback({}, {}, slow_kernels(network, config, some, runtime))
        bare = in_float(network, slow)
        rescaled = steps.step("scales", 1, lambda _: scaled(bare, config, some, runtime, pool).model)
        network = analyse(steps.store.scratch.located(rescaled, source), config.selection)
        parts = find_parts(network.model)
        aimed = aimed_at(network, measured_tensors(parts))
        observation = steps.step("observe", 1, lambda _: observe(aimed, parts, split.seen, runtime))
        observation = replace(observation, metric=chosen_metric(observation.metric, config))
        empty = unfed(network, observation.sizes) | slow
        aimed = in_float(aimed, empty)
        bench = Bench(aimed, config, split, observation, runtime, pool, steps)
        large = is_large(aimed, config)
        own = bench.without_layers() if large else bench
        if large and pool.sums.shared:
            every(
                [bench.table_rows, LargeBench.of(bench).moments, lambda: own.first_order(own.clipped(own.candidates()))]
            )
        rows, lost = bench.table_rows()
        candidates = own.candidates()
        if config.measure == "probe":
            measured = own.exact(candidates)
        else:
            coarse, candidates = candidates, own.clipped(candidates)
            measured = own.first_order(candidates)
            candidates, measured = own.checked(candidates, coarse, measured)
        if not large:
            pool.sums.settle()
        measured = replace(measured, missing={**measured.missing, **lost})
        count = bench.independent(bench.plan(aimed, split.measuring).averaged())
        found = Measured(candidates, measured, count, rows)
        if large:
            return _layer_by_layer(source, network, bench, found, empty, around)
        prober = bench.check(len(network.searched))
        fallback = empty | _fallback(bench, prober, candidates, measured)
        slower = slow_on_integers(aimed, config, observation.sizes, fallback.tensors)
        fallback |= FloatFallback({}, {}, slower)
        aimed = in_float(aimed, fallback)
        stored = StoredWeights(aimed, config.widths, rows, replace(prober, network=aimed), pool)
        layers = [
            (each, curves + stored.added(each.layer, each.codes)) for each, curves in best_roundings(network, found)
        ]
        with steps.progress.step("tables", len(aimed.stored)) as advance:
            for layer in aimed.stored:
                layers.append(stored.measured(layer))
                advance(1)
    return select(source, network, observation, layers, found, fallback)


def _fallback(bench: Bench, prober: Prober, candidates: Candidates, measured: Distortions) -> FloatFallback:
    """Choose what stays in float: what full width would ruin, and products that do not pay."""
    ruined = choose_fallback(bench.network, candidates, measured, bench.config, prober)
    return ruined | unpaid(prober, measured, bench.config, bench.observation, ruined)


def _layer_by_layer(
    source: onnx.ModelProto,
    network: Network,
    bench: Bench,
    activations: Measured,
    empty: FloatFallback,
    around: Around | None,
) -> Measurement:
    """Measure the weights of a large network, beside its `activations`."""
    large = LargeBench.of(bench)
    lost = large.collect(activations.rows)
    bench.pool.sums.settle()
    layerwise = large.coarse()
    large.round(layerwise, bench.network.layers)
    widest, curves = at_full_width(layerwise)
    candidates = replace(widest, activations=activations.candidates.activations)
    distortions = replace(activations.distortions, weights=tuple(curves))
    prober = bench.check(len(network.layers))
    fallback = empty | _fallback(bench, prober, candidates, distortions)
    remaining = in_float(bench.network, fallback)
    large.round(layerwise, remaining.stored)
    missing = {**activations.distortions.missing, **lost}
    found = replace(activations, candidates=candidates, distortions=replace(distortions, missing=missing))

    def assembled(layers: Layers) -> Measurement:
        return select(source, network, bench.observation, layers, found, fallback)

    return assembled(large.refine(layerwise, remaining.searched, assembled, around))


def stored_fields(measurement: Measurement) -> dict[str, Any]:
    """Return the fields of a measurement that cannot be derived from the normalized model and the settings."""
    names = (f.name for f in fields(measurement) if f.name not in ("source", "network", "scratch"))
    return {"model": measurement.network.model, **{name: getattr(measurement, name) for name in names}}


def restored(stored: Mapping[str, Any], source: onnx.ModelProto, config: Config, scratch: Scratch) -> Measurement:
    """Restore the measurement of `source` from its `stored_fields`. Raises ConfigError if `scratch` lacks its codes."""
    rest = {name: value for name, value in stored.items() if name != "model"}
    model = scratch.located(stored["model"], source)
    network = in_float(analyse(model, config.selection), stored["fallback"])
    layers = tuple(
        replace(_located(x, scratch), options=tuple(_located(o, scratch) for o in x.options)) for x in rest["layers"]
    )
    return Measurement(source=source, network=network, **{**rest, "layers": layers}, scratch=scratch)


def _located(made: T, scratch: Scratch) -> T:
    """Return a layer, or an option of one, with its codes where they are now."""
    if not isinstance(made.codes, SpooledCodes):
        return made
    if not scratch.has(made.codes.name):
        raise scratch.incomplete()
    return replace(made, codes=replace(made.codes, folder=str(scratch.folder)))


def measure(
    network: Network,
    config: Config,
    split: SampleSplit,
    runtime: Runtime,
    steps: Steps,
    around: Around | None = None,
) -> Measurement:
    """Measure the curves of `network`, anchored to exact runs if the effort allows; `steps` keeps the result.

    around: as for `measure_network`.
    """
    kept = steps.get("measurement")
    if kept is not None:
        steps.progress.note("curves: measured by an earlier run")
        return restored(kept, network.model, config, steps.store.scratch)
    scratch = steps.store.scratch
    measurement = replace(measure_network(network, config, split, runtime, steps, around), scratch=scratch)
    first = measurement
    measurement = anchored(first, config, split, runtime, steps)
    before = None if measurement is first else option_curves(_falling(with_unreached(first)))
    measurement = replace(_falling(with_unreached(measurement)), unanchored=before)
    measurement = with_divergence(measurement, first, config, split, runtime, steps)
    steps.finish("measurement", stored_fields(measurement))
    return measurement


def _falling(measurement: Measurement) -> Measurement:
    """Correct curves that few samples let rise with the width."""

    def falling(layer: Layer, codes: Mapping[int, WeightCodes], distortion: Float) -> Float:
        errors = squared_errors(list(codes.values()), measurement.network.rows(layer))
        result = distortion.copy()
        result[:, list(codes)] = falling_curves(distortion[:, list(codes)], errors)
        return result

    distortion, layers = measurement.curves.distortion.copy(), []
    for each, rows in zip(measurement.layers, measurement.unit_rows(), strict=True):
        distortion[rows] = falling(each.layer, each.codes, distortion[rows])
        curves = [falling(each.layer, o.codes, o.distortion) for o in each.options]
        layers.append(with_option_curves(each, curves))
    return replace(measurement, layers=tuple(layers), curves=replace(measurement.curves, distortion=distortion))

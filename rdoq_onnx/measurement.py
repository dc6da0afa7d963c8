"""Samples in, curves out: candidates at every width, and what each would do to the network's output."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from rdoq_onnx.analysis import Activation, Network, analyse
from rdoq_onnx.backward import EXACT_ROWS
from rdoq_onnx.candidates import Candidates, make_candidates, widest
from rdoq_onnx.config import MAX_BITS, Config
from rdoq_onnx.curves import Curves
from rdoq_onnx.curves_file import Steps, Store
from rdoq_onnx.equalization import equalize, exponent_for
from rdoq_onnx.errors import ModelError
from rdoq_onnx.moments import collect, passes
from rdoq_onnx.observation import Observation, observe, targets, with_outputs
from rdoq_onnx.parallel import Workers, workers
from rdoq_onnx.probe import Prober, complete, exact
from rdoq_onnx.progress import Advance, Progress
from rdoq_onnx.quantizer import Affine, WeightCodes, refined
from rdoq_onnx.runtime import Runtime
from rdoq_onnx.samples import Samples
from rdoq_onnx.sensitivity import with_sensitivity
from rdoq_onnx.tails import with_unseen
from rdoq_onnx.taylor import Distortions, first_order
from rdoq_onnx.variants import expected, picked

EQUALIZING = 32  # samples that channel ranges are found on
CLIPPING = 32  # samples that the range of each activation's quantizer is first found on
SENSING = 256  # samples that the sensitivity of rounding is found on
FITTING = 2 / 3  # share of the samples that rounding is fitted to


@dataclass(frozen=True)
class Measurement:
    """The curves of a network, and the candidates that they describe.

    source: the normalized model. network: the same with channel ranges evened out, and what there is to quantize in it.
    codes: for each layer, its channels at each width offered. means: for each layer, the mean input [G, K] that its
        bias is corrected for. offsets: for each layer, what is added to its outputs besides, or None.
    quantizers: each activation's quantizer at each width, with the clipping of least distortion.
    curves: a row for each channel of each layer, in order, then one for each activation; columns are 0 to 8 bits.
    probed: tensors that could not be differentiated and were measured exactly instead, with the reason.
    """

    source: onnx.ModelProto
    network: Network
    observation: Observation
    codes: tuple[Mapping[int, WeightCodes], ...]
    means: tuple[NDArray[np.float64], ...]
    offsets: tuple[NDArray[np.float64] | None, ...]
    quantizers: tuple[Mapping[int, Affine], ...]
    curves: Curves
    probed: Mapping[str, str]

    @property
    def aimed(self) -> Network:
        """The network with the tensors whose distortion is measured as its outputs."""
        return aimed_at(self.network, self.observation.metric.outputs)

    @property
    def channels(self) -> int:
        """Rows of `curves` that are weight channels; the rest are activations."""
        return sum(layer.linear.channels for layer in self.network.layers)

    def unit_rows(self) -> list[slice]:
        """The rows of `curves` that are each layer's channels."""
        ends = np.cumsum([0, *(layer.linear.channels for layer in self.network.layers)])
        return [slice(int(a), int(b)) for a, b in pairwise(ends)]

    def per_layer(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Values of all weight channels -> one array for each layer."""
        return [rows[part] for part in self.unit_rows()]


def stored_fields(measurement: Measurement) -> dict[str, Any]:
    """What a measurement is, but for what the normalized model and the settings tell again."""
    names = (f.name for f in fields(measurement) if f.name not in ("source", "network"))
    return {"model": measurement.network.model, **{name: getattr(measurement, name) for name in names}}


def restored(stored: Mapping[str, Any], source: onnx.ModelProto, config: Config) -> Measurement:
    """The measurement of `source` whose `stored_fields` these are."""
    rest = {name: value for name, value in stored.items() if name != "model"}
    return Measurement(source=source, network=analyse(stored["model"], config), **rest)


def split(samples: Samples, config: Config) -> tuple[Samples, Samples]:
    """Samples that rounding is fitted to, and samples that curves are measured on."""
    first, second = samples.split(FITTING, config.seed + 1)
    return (first, second) if len(second) else (samples, samples)


def differentiated(observation: Observation) -> int:
    """Samples that run together in reverse passes, which hold one set of adjoints for each unit vector v."""
    rows = observation.metric.elements if observation.metric.elements <= EXACT_ROWS else 1
    size = observation.batching.size
    return max(size * 3 // (2 + rows), 1) if observation.batching.rides else size


def aimed_at(network: Network, outputs: Sequence[str]) -> Network:
    """`network` with the tensors whose distortion is measured as its outputs."""
    return replace(network, model=with_outputs(network.model, outputs))


def regime(config: Config) -> str:
    """What of the activation budget a measurement depends on, as a name."""
    return "weights" if config.activation_bits is None else f"activations {exponent_for(config):g}"


def measure_network(
    network: Network, config: Config, samples: Samples, runtime: Runtime, progress: Progress, store: Store | None = None
) -> Measurement:
    """Observe the float network, make all candidates, measure all curves. What `store` has is not done again.

    Rounding is fitted to one part of the samples and measured on the other: curves of the samples that made the
    rounding would promise too much.
    """
    if not network.layers:
        return _unsearched(network, samples, runtime)
    keep = Steps(store or Store(), progress, regime(config))
    fitting, measuring = split(samples, config)
    offered = tuple(sorted({min(w, widest(network)) for w in config.widths}))
    with workers(config.threads) as pool:
        source, plain = network.model, network
        evened = keep.step("equalize", 1, lambda _: equalize(plain, config, fitting.some(EQUALIZING), runtime).model)
        network = analyse(evened, config)
        aimed = aimed_at(network, targets(network.model))
        observation = keep.step("observe", 1, lambda _: observe(aimed, samples, runtime))
        candidates = keep.get("candidates")
        if candidates is None:
            with progress.step("moments", len(fitting) * passes(network)) as advance:
                moments = collect(aimed, fitting, observation.batching, runtime, pool, advance)
            sensing = fitting.some(SENSING)
            with progress.step("sensitivity", len(sensing)) as advance:
                moments = with_sensitivity(
                    moments, replace(aimed, activations=()), sensing, observation.metric, runtime,
                    batch=observation.batching.size, seed=config.seed, workers=pool, advance=advance,
                )  # fmt: skip
            reach = {a.tensor: observation.reach(a.tensor) for a in network.activations}
            candidates = keep.step("candidates", 1, lambda _: make_candidates(network, offered, reach, moments, pool))
        if network.activations and config.measure == "taylor":
            clipped = keep.step("clipping", CLIPPING, lambda advance: _clipped(
                aimed, config, candidates, fitting, observation, runtime, pool, advance
            ))  # fmt: skip
            candidates = replace(candidates, activations=clipped)
        measured = _measure(aimed, config, candidates, measuring, observation, runtime, pool, keep)
        measured = _with_unseen(network, candidates, measured, observation)
    return _chosen(source, network, observation, candidates, measured)


def _unsearched(network: Network, samples: Samples, runtime: Runtime) -> Measurement:
    """No curves: all that is quantized of `network` is outside the search."""
    observation = observe(aimed_at(network, targets(network.model)), samples, runtime)
    curves = curves_of(network, observation, (), [], [])
    return Measurement(network.model, network, observation, (), (), (), (), curves, {})


def _clipped(
    network: Network,
    config: Config,
    candidates: Candidates,
    samples: Samples,
    observation: Observation,
    runtime: Runtime,
    pool: Workers,
    advance: Advance,
) -> tuple[Mapping[int, tuple[Affine, ...]], ...]:
    """Fewer, finer quantizers for each activation than `candidates` has: those around the best on some of `samples`."""
    alone = replace(network, layers=())
    found = first_order(
        alone, replace(candidates, means=(), weights=()), samples.some(CLIPPING), observation.metric, runtime,
        batch=differentiated(observation), seed=config.seed, workers=pool, advance=advance,
    )  # fmt: skip
    likely = _with_unseen(network, candidates, found, observation).activations
    return tuple(
        {
            bits: tuple(refined(table[bits][int(np.argmin(values[bits]))], *observation.reach(activation.tensor)))
            for bits in table
        }
        if activation.tensor not in found.missing
        else table
        for activation, table, values in zip(network.activations, candidates.activations, likely, strict=True)
    )


def _with_unseen(
    network: Network, candidates: Candidates, found: Distortions, observation: Observation
) -> Distortions:
    tensors = [a.tensor for a in network.activations]
    return replace(
        found, activations=with_unseen(tensors, candidates.activations, found.activations, observation.tails)
    )


def _measure(
    network: Network,
    config: Config,
    candidates: Candidates,
    samples: Samples,
    observation: Observation,
    runtime: Runtime,
    pool: Workers,
    keep: Steps,
) -> Distortions:
    prober = Prober(network, samples, observation.metric, runtime, observation.batching)
    if config.measure == "probe":
        total = len(network.layers) + len(network.activations)
        return keep.step("probe", total, lambda advance: exact(
            network, candidates, prober, advance=advance, unfinished=keep.unfinished("probe")
        ))  # fmt: skip
    found = keep.step("taylor", len(samples), lambda advance: first_order(
        network, candidates, samples, observation.metric, runtime,
        batch=differentiated(observation), seed=config.seed, workers=pool, advance=advance,
        unfinished=keep.unfinished("taylor"),
    ))  # fmt: skip
    measured = found
    if found.missing:
        measured = keep.step("probe", 1, lambda _: complete(found, network, candidates, prober))
    _check_finite(network, measured)
    return measured


def _check_finite(network: Network, measured: Distortions) -> None:
    found = [(x.name, list(w)) for x, w in zip(network.layers, measured.weights, strict=True)]
    found += [(a.tensor, list(v.values())) for a, v in zip(network.activations, measured.activations, strict=True)]
    for name, curves in found:
        if not all(np.isfinite(c).all() for c in curves):
            raise ModelError(f"the distortion of {name!r} is not finite; check its weights, or --exclude it")


def _chosen(
    source: onnx.ModelProto,
    network: Network,
    observation: Observation,
    candidates: Candidates,
    measured: Distortions,
) -> Measurement:
    """The best variant of rounding for each channel and width, the best clipping for each activation and width."""
    codes: list[dict[int, WeightCodes]] = []
    weights: list[NDArray[np.float64]] = []
    for variants, found in zip(candidates.weights, measured.weights, strict=True):
        likely = expected(found)
        best = likely.argmin(axis=0)
        codes.append({b: picked([v[k] for v in variants], best[:, k]) for k, b in enumerate(candidates.widths)})
        weights.append(np.take_along_axis(likely, best[None], axis=0)[0])
    quantizers: list[dict[int, Affine]] = []
    activations: list[dict[int, float]] = []
    for table, values in zip(candidates.activations, measured.activations, strict=True):
        tightest = {bits: int(np.argmin(v)) for bits, v in values.items()}
        quantizers.append({bits: table[bits][k] for bits, k in tightest.items()})
        activations.append({bits: float(values[bits][k]) for bits, k in tightest.items()})
    curves = curves_of(network, observation, candidates.widths, weights, activations)
    return Measurement(
        source, network, observation, tuple(codes), candidates.means, (None,) * len(codes), tuple(quantizers), curves,
        measured.missing,
    )


def activation_elements(activation: Activation, sizes: Mapping[str, int]) -> int:
    """Elements of one sample that an activation spends its bits on: those of the tensors that feed a layer."""
    return sum(sizes[t] for t in activation.feeds) or sizes[activation.tensor]


def curves_of(
    network: Network,
    observation: Observation,
    offered: tuple[int, ...],
    weights: list[NDArray[np.float64]],
    activations: list[dict[int, float]],
) -> Curves:
    channels = sum(layer.linear.channels for layer in network.layers)
    distortion = np.full((channels + len(activations), MAX_BITS + 1), np.inf)
    if weights:
        distortion[:channels, list(offered)] = np.concatenate(weights)
    elements = [np.full(x.linear.channels, np.prod(x.linear.shape) // x.linear.channels) for x in network.layers]
    for row, curve in zip(distortion[channels:], activations, strict=True):
        row[list(curve)] = list(curve.values())
    sizes = [activation_elements(a, observation.sizes) for a in network.activations]
    return Curves(
        np.arange(MAX_BITS + 1), np.concatenate([*elements, np.array(sizes, np.int64)]).astype(np.int64), distortion
    )

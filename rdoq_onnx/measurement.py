"""Samples in, curves out: candidates at every width, and what each would do to the network's output."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.analysis import Activation, Network
from rdoq_onnx.candidates import make_candidates, widest
from rdoq_onnx.config import MAX_BITS, Config
from rdoq_onnx.curves import Curves
from rdoq_onnx.observation import Observation, observe
from rdoq_onnx.probe import Prober, complete, exact
from rdoq_onnx.progress import Progress
from rdoq_onnx.quantizer import Affine, WeightCodes
from rdoq_onnx.runtime import Runtime
from rdoq_onnx.samples import Samples
from rdoq_onnx.taylor import Distortions, first_order


@dataclass(frozen=True)
class Measurement:
    """The curves of a network, and the candidates that they describe.

    network: the normalized model and what there is to quantize in it.
    codes: for each layer, its channels at each width offered. quantizers: the same for each activation, with the
        clipping of least distortion.
    curves: a row for each channel of each layer, in order, then one for each activation; columns are 0 to 8 bits.
    probed: tensors that could not be differentiated and were measured exactly instead, with the reason.
    """

    network: Network
    observation: Observation
    codes: tuple[Mapping[int, WeightCodes], ...]
    quantizers: tuple[Mapping[int, Affine], ...]
    curves: Curves
    probed: Mapping[str, str]

    @property
    def channels(self) -> int:
        """Rows of `curves` that are weight channels; the rest are activations."""
        return sum(layer.linear.channels for layer in self.network.layers)

    def per_layer(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Values of all weight channels -> one array for each layer."""
        ends = np.cumsum([layer.linear.channels for layer in self.network.layers])
        return np.split(rows[: self.channels], ends[:-1])


def measure_network(
    network: Network, config: Config, samples: Samples, runtime: Runtime, progress: Progress
) -> Measurement:
    """Observe the float network, make all candidates, measure all curves."""
    with progress.step("observe"):
        observation = observe(network, samples, runtime)
    offered = tuple(sorted({min(w, widest(bool(network.activations))) for w in config.widths}))
    with progress.step("candidates"):
        candidates = make_candidates(network, offered, observation.ranges)
    batching = observation.batching
    prober = Prober(network, samples, observation.metric, runtime, batching)
    if config.measure == "probe":
        with progress.step("probe", len(network.layers) + len(network.activations)) as advance:
            measured = exact(network, candidates, prober, advance=advance)
    else:
        with progress.step("taylor", len(samples)) as advance:
            measured = first_order(
                network, candidates, samples, observation.metric, runtime,
                batch=batching.size, seed=config.seed, advance=advance,
            )  # fmt: skip
        if measured.missing:
            with progress.step("probe"):
                measured = complete(measured, network, candidates, prober)
    quantizers: list[dict[int, Affine]] = []
    curves: list[dict[int, float]] = []
    for table, found in zip(candidates.activations, measured.activations, strict=True):
        best = {bits: int(np.argmin(values)) for bits, values in found.items()}
        quantizers.append({bits: table[bits][k] for bits, k in best.items()})
        curves.append({bits: float(found[bits][k]) for bits, k in best.items()})
    codes = tuple(dict(zip(offered, several, strict=True)) for several in candidates.weights)
    all_curves = _curves(network, observation, offered, measured, curves)
    return Measurement(network, observation, codes, tuple(quantizers), all_curves, measured.missing)


def activation_elements(activation: Activation, sizes: Mapping[str, int]) -> int:
    """Elements of one sample that an activation spends its bits on: those of the tensors that feed a layer."""
    return sum(sizes[t] for t in activation.feeds) or sizes[activation.tensor]


def _curves(
    network: Network,
    observation: Observation,
    offered: tuple[int, ...],
    measured: Distortions,
    activations: list[dict[int, float]],
) -> Curves:
    channels = sum(layer.linear.channels for layer in network.layers)
    distortion = np.full((channels + len(activations), MAX_BITS + 1), np.inf)
    distortion[:channels, list(offered)] = np.concatenate(measured.weights)
    elements = [np.full(x.linear.channels, np.prod(x.linear.shape) // x.linear.channels) for x in network.layers]
    for row, curve in zip(distortion[channels:], activations, strict=True):
        row[list(curve)] = list(curve.values())
    sizes = [activation_elements(a, observation.sizes) for a in network.activations]
    return Curves(
        np.arange(MAX_BITS + 1), np.concatenate([*elements, np.array(sizes, np.int64)]).astype(np.int64), distortion
    )

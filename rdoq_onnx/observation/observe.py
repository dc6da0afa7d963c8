"""Forward pass of the float network over the samples: sizes, ranges, output power and batching."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.calibration.split import FEW_SAMPLES
from rdoq_onnx.model.protos import with_outputs
from rdoq_onnx.observation.batching import Batching, find_batching, observed_tensors
from rdoq_onnx.observation.distortion import Metric, metric_of
from rdoq_onnx.observation.parts import Part
from rdoq_onnx.observation.ranges import ends_of, has_quiet_samples, margin, widened, with_ends
from rdoq_onnx.observation.tail_model import FEW_VALUES, ExtremeValues
from rdoq_onnx.system.runtime import Runtime

Array = NDArray[Any]


@dataclass(frozen=True)
class Observation:
    """Results of one pass over the samples.

    ranges: least and greatest value of each activation, with a margin if samples are few. sizes: elements per sample of
    each observed tensor, on average where samples differ in shape; budgets count these. samples: their number.
    extremes: extreme values of activations observed at few values. quiet: activations that are far smaller in
    some samples than in others.
    """

    ranges: Mapping[str, tuple[float, float]]
    sizes: Mapping[str, int]
    metric: Metric
    batching: Batching
    samples: int
    extremes: Mapping[str, ExtremeValues]
    quiet: tuple[str, ...] = ()

    @property
    def few(self) -> bool:
        """Whether there are too few samples to clip ranges safely."""
        return self.samples < FEW_SAMPLES

    def reach(self, tensor: str) -> tuple[float, float]:
        """Return the widest range that a quantizer of the activation may have."""
        low, high = self.ranges[tensor]
        least, greatest = self.extremes[tensor].reach if tensor in self.extremes else (low, high)
        return min(low, least), max(high, greatest)


def observe(network: Network, parts: Sequence[Part], samples: Samples, runtime: Runtime) -> Observation:
    """Run the float `network`, whose outputs are the tensors measured of `parts`, over all `samples`.

    Raises CalibrationError if the network does not run on them or its outputs are not finite.
    """
    activations = [a.tensor for a in network.activations]
    outputs = [o.name for o in network.model.graph.output]
    names = observed_tensors(network)
    session = runtime.session(with_outputs(network.model, [*dict.fromkeys([*outputs, *names])]), "all")
    batching, sizes = find_batching(session, samples, names)
    activations = [name for name in activations if sizes[name]]
    ends: dict[str, list[NDArray[np.float64]]] = {n: [] for n in activations}
    probabilities = {o for n in network.model.graph.node if n.op_type == "Softmax" for o in n.output}
    unbounded = [n for n in activations if n not in probabilities]
    few: dict[str, list[Array]] = {n: [] for n in unbounded if sizes[n] * len(samples) <= FEW_VALUES}
    model = with_outputs(network.model, [*dict.fromkeys([*outputs, *few])])
    session = runtime.session(with_ends(model, activations), "all")

    def run() -> Iterator[tuple[int, dict[str, Array]]]:
        for count, feeds in samples.counted_batches(batching.size):
            values = dict(zip(session.outputs, session.run(feeds), strict=True))
            for name in activations:
                ends[name].append(ends_of(name, values, count if batching.stackable else 1))
            for name, parts in few.items():
                parts.append(values[name].reshape(-1))
            yield count, {name: np.asarray(values[name]) for name in outputs}

    metric = metric_of(parts, run(), len(samples))
    share = margin(len(samples))
    joined = {name: np.concatenate(parts, axis=1) for name, parts in ends.items()}
    ranges = {name: (0.0, 1.0) if name in probabilities else widened(values, share) for name, values in joined.items()}
    quiet = tuple(name for name, values in joined.items() if has_quiet_samples(values))
    extremes = {name: ExtremeValues.of(np.concatenate(parts)) for name, parts in few.items()}
    return Observation(ranges, sizes, metric, batching, len(samples), extremes, quiet)

"""Statistics of the layers of a large network: sums over samples, made once and kept in the scratch folder.

    mean, covariance   of a layer's unfolded input (moments.py), and the number of its vectors; layers that read the
                       same input share them
    sensitivity        F = E[Σ_j ∇_j ∇_jᵀ] (sensitivity.py)
    basis              the eigenvectors of F, or of the covariance where there is no F

They are sums in a fixed order, in portions of layers that fit in memory. Once they are made, nothing needs the samples
but the curves' own pass, and each layer is worked on by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.samples import Samples
from rdoq_onnx.candidates.moment_passes import first_of_input, of_inputs, portions
from rdoq_onnx.candidates.moments import Moments
from rdoq_onnx.candidates.sensitivity import with_sensitivity
from rdoq_onnx.gradients.plan import ReversePlan
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.system.progress import Advance
from rdoq_onnx.system.runtime import Runtime
from rdoq_onnx.system.scratch import Scratch
from rdoq_onnx.system.summation import every
from rdoq_onnx.system.threads import Workers

Array = NDArray[Any]


@dataclass(frozen=True)
class Statistics:
    """The statistics of `network`, in `scratch` under names that begin with `prefix`.

    memory: bytes that the sums of one pass may take.
    """

    network: Network
    scratch: Scratch
    prefix: str
    memory: int

    def moments(self, layer: Layer) -> Moments:
        """Return the moments of a layer; its sensitivity is None where there is none."""
        first = self.first(layer)
        mean, covariance = self.get("mean", first), self.get("covariance", first)
        sensitivity = self.get("sensitivity", layer) if self.has("sensitivity", layer) else None
        return Moments(mean.astype(np.float64), covariance, sensitivity, int(self.get("vectors", first)[0]))

    def basis(self, layer: Layer) -> Array:
        """Return the eigenvectors U [G·parts, B, B] of a layer, in columns."""
        return self.get("basis", layer)

    def get(self, kind: str, layer: Layer) -> Array:
        """Map what is kept of a layer."""
        return self.scratch.get(self.name(kind, layer))

    def has(self, kind: str, layer: Layer) -> bool:
        return self.scratch.has(self.name(kind, layer))

    def put(self, kind: str, layer: Layer, array: Array) -> None:
        """Keep an array of a layer."""
        self.scratch.put(self.name(kind, layer), array)

    def kept(self, layer: Layer) -> list[str]:
        """List the names of all that is kept of a layer."""
        begin, end = f"{self.prefix}-", self.name("", layer).removeprefix(self.prefix + "-")
        return [name for name in self.scratch.names() if name.startswith(begin) and name.endswith(end)]

    def first(self, layer: Layer) -> Layer:
        """Return the layer that the moments of a layer's input are kept with."""
        return self._first.get(layer.name, layer)

    def name(self, kind: str, layer: Layer) -> str:
        return f"{self.prefix}-{kind}-{self._index[layer.name]}"

    def collect(self, samples: Samples, batch: int, runtime: Runtime, workers: Workers, advance: Advance) -> None:
        """Collect mean and covariance of each input that is not kept yet."""

        def of_portion(portion: list[Layer]) -> None:
            missing = [x for x in portion if not self.has("covariance", self._first[x.name])]
            if not missing:
                advance(len(samples))
                return
            part = replace(self.network, layers=tuple(missing))
            for layer, moments in of_inputs(part, samples, batch, runtime, workers, advance):
                self.put("mean", layer, moments.mean)
                self.put("vectors", layer, np.array([moments.vectors]))
                self.put("covariance", layer, moments.covariance.astype(np.float32))

        every(partial(of_portion, portion) for portion in portions(self.network.layers, self.memory))

    def sense(self, plan: ReversePlan, advance: Advance) -> None:
        """Collect the sensitivity of each layer and its basis, as far as they are not kept yet."""

        def of_portion(portion: list[Layer]) -> None:
            missing = tuple(x for x in portion if not self.has("basis", x))
            if not missing:
                advance(len(plan.samples))
                return
            network, name = replace(plan.network, layers=missing), portion_name(plan.name, portion, missing)
            means = [replace(self.moments(layer), sensitivity=None) for layer in missing]
            sensed = with_sensitivity(replace(plan, network=network, name=name), means, advance, np.float32)
            plan.workers.map(self._put, missing, sensed)

        every(partial(of_portion, portion) for portion in self.sensed_portions())

    def sensed_portions(self) -> list[list[Layer]]:
        """Divide the layers into those whose sensitivities one pass sums, in single precision."""
        return list(portions(self.network.layers, 2 * self.memory, shared=False))

    def _put(self, layer: Layer, moments: Moments) -> None:
        second = moments.covariance
        if moments.sensitivity is not None:
            second = moments.sensitivity
            self.put("sensitivity", layer, second)
        self.put("basis", layer, np.linalg.eigh(second)[1])

    @cached_property
    def _index(self) -> dict[str, int]:
        return {layer.name: k for k, layer in enumerate(self.network.weights)}

    @cached_property
    def _first(self) -> dict[str, Layer]:
        return first_of_input(self.network.layers)


def portion_name(name: str, portion: Sequence[Layer], missing: Sequence[Layer]) -> str:
    """Name the sum `name` of a portion of the layers; a killed run's remainder of one is no sum that others take."""
    return f"{name} of {portion[0].name}" if len(missing) == len(portion) else ""

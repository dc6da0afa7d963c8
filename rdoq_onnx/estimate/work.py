"""What a run computes, counted from sizes: products of weights, moments, and the samples that each step runs.

A layer with weights W [O, K] and P positions per sample takes W·P multiplications in a forward pass. In numpy come
K²·P for a second moment of its input, and for the gradient in its weights W·P.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from rdoq_onnx.analysis.network import Network
from rdoq_onnx.calibration.split import FEW_SAMPLES, FITTING, HELD_OUT
from rdoq_onnx.candidates.candidates import widest
from rdoq_onnx.candidates.moment_passes import first_of_input, second_bytes
from rdoq_onnx.candidates.more_images import number_of_copies
from rdoq_onnx.config import Config
from rdoq_onnx.curves.steps import SENSING
from rdoq_onnx.gradients.batch_sizes import least_draws, reverse_batch
from rdoq_onnx.gradients.plan import rounds, rows_of
from rdoq_onnx.model.external import Place
from rdoq_onnx.model.layers import Layer
from rdoq_onnx.model.sizes import tensor_bytes
from rdoq_onnx.observation.observe import Observation
from rdoq_onnx.system.runtime import Runtime

VARIANTS = 3  # of compensation, where there is a sensitivity


@dataclass(frozen=True)
class LayerWork:
    """One layer: its weights, the inputs of each, the entries of its second moment, its positions per sample."""

    layer: Layer
    weights: int
    inputs: int
    second: int
    positions: int

    @property
    def channels(self) -> int:
        return self.layer.linear.channels

    @property
    def width(self) -> int:
        """The inputs that share one second moment."""
        return max(self.second // (self.layer.linear.group * self.inputs), 1)

    @property
    def blocks(self) -> int:
        """The block sizes that it is rounded with."""
        return len(self.layer.blocks)

    @property
    def variants(self) -> int:
        """Roundings with compensation at each width, where all layers are measured at once."""
        return sum(1 if block else VARIANTS for block in self.layer.blocks)

    @property
    def forward(self) -> int:
        """Multiplications of a forward pass of one sample."""
        return self.weights * self.positions

    @property
    def unfolded(self) -> int:
        """Elements of the unfolded input of one sample."""
        return self.layer.linear.group * self.inputs * self.positions

    @property
    def sensing(self) -> int:
        """Multiplications of the second moment of the gradient of one sample (sensitivity.py)."""
        if self.positions < self.channels:
            return self.positions * (self.positions * (self.channels + self.inputs) + self.second)
        return self.forward + self.second * self.channels // self.layer.linear.group


@dataclass(frozen=True)
class Work:
    """What quantizing `network`, whose outputs are the measured tensors, with a number of `samples` computes.

    inner: elements of all tensors of a sample, also of those that no step observes.
    """

    network: Network
    config: Config
    runtime: Runtime
    observation: Observation
    samples: int
    inner: int

    @property
    def seen(self) -> float:
        return self.samples * (1 - HELD_OUT)

    @property
    def held_out(self) -> float:
        return self.samples - self.seen

    @property
    def fitting(self) -> float:
        return self.seen * FITTING

    @property
    def measuring(self) -> float:
        return max(self.seen - self.fitting, 1)

    @property
    def judging(self) -> float:
        """Samples that activations are measured on."""
        return self.seen if self.measuring < FEW_SAMPLES else self.measuring

    @property
    def compared(self) -> float:
        """Further samples whose moments are made, to compare those with augmented copies with those without."""
        count = number_of_copies(self.network, int(self.fitting)) if self.config.effort == "best" else 0
        return count and self.fitting + count + self.measuring

    @property
    def sensing(self) -> float:
        """Runs of the sensitivity, but for the few layers whose moments are better with copies."""
        count = min(SENSING, max(self.fitting, 1))
        return count * rounds(max(int(count), 1))

    @property
    def rows(self) -> int:
        """v in one pass."""
        return rows_of(self.observation.metric.elements)

    def runs(self, samples: float) -> float:
        """Return the reverse passes of first order over `samples`, in samples."""
        return samples if self.rows > 1 else samples * rounds(max(int(samples), 1), least_draws(self.observation))

    @cached_property
    def layers(self) -> tuple[LayerWork, ...]:
        return tuple(self._layers())

    @cached_property
    def stored(self) -> tuple[LayerWork, ...]:
        """The weights that no product unfolds."""
        return tuple(
            LayerWork(x, math.prod(x.linear.shape), x.linear.inputs, second_bytes(x) // 8, 0)
            for x in self.network.stored
        )

    @cached_property
    def inputs(self) -> tuple[LayerWork, ...]:
        """Those layers whose moments are made; the others share them."""
        firsts = {layer.name for layer in first_of_input(self.network.layers).values()}
        return tuple(x for x in self.layers if x.layer.name in firsts)

    @cached_property
    def weights(self) -> int:
        return sum(x.weights for x in self.layers)

    @cached_property
    def tensors(self) -> int:
        """Elements of all observed tensors of an average sample."""
        return sum(self.observation.sizes.values())

    @cached_property
    def model(self) -> int:
        """Bytes of the model's tensors."""
        places = (Place.of(t) for t in self.network.model.graph.initializer)
        return tensor_bytes(self.network.model) + sum(p.length for p in places if p is not None)

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that channels are rounded to."""
        return tuple(sorted({min(w, widest(self.network)) for w in self.config.widths}))

    @cached_property
    def quantized(self) -> int:
        """Elements of all activations of an average sample."""
        return sum(self.observation.sizes[a.tensor] for a in self.network.activations)

    def backward_batch(self, exact: bool = True) -> int:
        """Return the samples of a reverse pass."""
        return reverse_batch(self.network, self.observation, self.runtime, max(int(self.measuring), 1), exact)

    def filled(self, samples: float, runs: float) -> float:
        """Return the samples that run backwards for `runs` of `samples` samples: copies fill the last batch."""
        batch, count = self.backward_batch(), max(samples, 1)
        return runs * -(-count // batch) * batch / count

    def _layers(self) -> Iterator[LayerWork]:
        sizes = self.observation.sizes
        for layer in self.network.layers:
            weights, linear = math.prod(layer.linear.shape), layer.linear
            positions = sum(u.linear.positions(sizes[u.output]) for u in layer.uses)
            yield LayerWork(layer, weights, linear.inputs, second_bytes(layer) // 8, positions)
